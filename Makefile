# make setup   .venv with everything
# make demo    upcycle SmolLM2-135M-Instruct on this machine, into runs/demo
# make test    lint, types, tests; beside them tests/serve, with vLLM's engine on the CPU, shown when all is done
# make test-gpu  the kernels against their references; needs a GPU and pip install '.[gpu]'
.PHONY: setup demo test test-gpu lint clean

setup: .venv/.ready

.venv/.ready: pyproject.toml scripts/setup.sh
	scripts/setup.sh

demo: setup
	.venv/bin/hylo demo --output runs/demo

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	.venv/bin/python -m pytest tests/serve >.venv/serve.log 2>&1 & serve=$$!; \
	.venv/bin/python -m pytest --ignore tests/serve; rest=$$?; \
	wait $$serve; served=$$?; cat .venv/serve.log; exit $$((rest | served))

test-gpu:
	HYLO_TEST_GPU=1 python3 -m pytest tests/gpu

clean:
	rm -rf .venv runs build *.egg-info
