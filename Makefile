# make demo: set up, restore a real clip.  make test: set up, check, test.  Both may be repeated.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
READY := .venv/.ready

.PHONY: demo test check gpu judges clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: check judges
	$(BIN)/python -m pytest

# On a machine with an NVIDIA GPU: its tests, then the figures that docs/speed.md asks for. The last
# takes longest: its plain path walks every pixel of four directions by itself.
BENCH := $(BIN)/mtair bench --device cuda:0 --model configs/models
gpu: $(READY)
	REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/scan_gpu.py
	$(BENCH)/small.yaml --size 1920x1080
	$(BENCH)/base.yaml --size 1280x720

# Programs that judge from outside: ffprobe the files, Chromium the page. Where they cannot be
# installed, the tests that need them are skipped and say so.
judges:
	@for program in ffprobe chromium; do command -v $$program >/dev/null || missing=1; done; \
	test -z "$$missing" || { apt-get update -qq && apt-get install -y -qq ffmpeg chromium >/dev/null; } \
	|| echo "no ffprobe or no chromium: install ffmpeg and chromium to run every test"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without an NVIDIA GPU the CPU build of torch comes first, so that nothing after it can pull in
# gigabytes of CUDA: from the configured index if that has it, else from PyTorch's own.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null 2>&1 \
	  || $(PIP) install -q torch==$(TORCH)+cpu \
	  || $(PIP) install -q torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build *.egg-info
