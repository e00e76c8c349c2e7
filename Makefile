# make demo: train a BERT here and now.  make test: the test suite.  Both set up .venv first.

PYTHON ?= python3
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
# Two CPU ranks without a GPU, else all GPUs.
LAUNCH := $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu .venv/bin/deepspeed --num_gpus 2,.venv/bin/deepspeed)
OVERRIDES ?=

.PHONY: demo test lint clean
demo: .venv/.installed
	$(LAUNCH) --log_level error recipes/pretrain.py experiment=demo $(OVERRIDES)

test: .venv/.installed
	.venv/bin/pytest

lint: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
