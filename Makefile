# make demo: train a BERT here and now.  make check: lint, types, quick tests.  make test: all tests.  make mutants: can
# they fail?  All set up .venv.

PYTHON ?= python3
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
# Two CPU ranks without a GPU, else all GPUs.
LAUNCH := $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu .venv/bin/deepspeed --num_gpus 2,.venv/bin/deepspeed)
OVERRIDES ?=

# make image: for NVIDIA GPUs.  make image DEVICE=cpu.  More arguments: IMAGE_ARGS='--build-arg CPU_ARCH=x86-64-v4'
DEVICE ?= cuda
IMAGE ?= deepspeed-toolkit$(if $(filter cpu,$(DEVICE)),:cpu)
IMAGE_ARGS ?=
CPU_ARGS := --build-arg BASE_IMAGE=ubuntu:24.04 --build-arg RUNTIME_IMAGE=ubuntu:24.04
BUILDER ?= $(shell docker info > /dev/null 2>&1 && echo docker || command -v podman || command -v buildah)

.PHONY: demo check test fast lint mutants docs image image-test clean
demo: .venv/.installed
	$(LAUNCH) --log_level error recipes/pretrain.py experiment=demo $(OVERRIDES)

# Between edits: what is wrong with the text, with types, and all tests that launch nothing.
check: .venv/.installed
	$(MAKE) -j 2 --output-sync lint fast

# What launches nothing two tests at a time; then the others one by one, for ranks that wait for each other spin: two
# jobs of two ranks on two cores take far longer than one after the other.
test: .venv/.installed
	$(MAKE) fast; first=$$?; .venv/bin/pytest -m "launch or alone" --durations 25 && exit $$first

fast: .venv/.installed
	.venv/bin/pytest -n 2 --dist loadgroup -m "not launch and not alone"

lint: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# The pages of docs/ as a site, in build/site; a broken link or a stale reference fails.
docs: .venv/.installed
	.venv/bin/mkdocs build --strict

# Do tests fail? Chosen lines are broken one at a time, in a copy, and a test goes red for each. ONLY=checkpoint
mutants: .venv/.installed
	DS_ACCELERATOR=cpu .venv/bin/python tests/mutants.py $(ONLY)

image:
	$(if $(BUILDER),,$(error make image needs docker, podman or buildah))
	BUILDAH_FORMAT=docker $(BUILDER) build -f docker/Dockerfile -t $(IMAGE) --build-arg ACCELERATOR=$(DEVICE) \
		$(if $(filter cpu,$(DEVICE)),$(CPU_ARGS)) --build-arg REVISION=$$(git rev-parse HEAD) $(IMAGE_ARGS) .

# Builds the CPU image from nothing and runs it; needs root, buildah and debootstrap.
image-test: .venv/.installed
	TOOLKIT_IMAGE_TEST=$${TOOLKIT_IMAGE_TEST:-build/image} .venv/bin/pytest tests/test_image.py

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
