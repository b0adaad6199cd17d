"""`hylo import` and `hylo export` on the command line."""

from pathlib import Path

import pytest
import typer
from click.testing import Result
from released import write_released
from typer.testing import CliRunner

from hylo.commands.interop import register
from hylo.errors import HyLoError

app = typer.Typer()
register(app)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_import_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_released(Path("[bold]released"))
    result = run("import", "[bold]released", "ours")
    assert result.exit_code == 0, result.output
    parameters = result.stdout.split()[2]
    assert result.stdout == f"ours: 2GDN2MLA, {parameters} parameters\n"
    result = run("export", "ours", "[bold]again")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"[bold]again: 2GDN2MLA, {parameters} parameters\n"
    before, after = (Path(name, "model.safetensors").read_bytes() for name in ("[bold]released", "[bold]again"))
    assert before == after
    result = run("import", "[bold]released", "ours")
    assert "--overwrite" in str(result.exception)
    assert run("import", "[bold]released", "ours", "--overwrite").exit_code == 0


@pytest.mark.parametrize("command", ["import", "export"])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, command: str) -> None:
    source = write_released(tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"no")
    for given, named in ((source, "source"), (tmp_path / "nowhere", "nowhere")):
        result = run(command, given, tmp_path / "out")
        assert isinstance(result.exception, HyLoError)
        assert named in str(result.exception)
        assert "\n" not in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
