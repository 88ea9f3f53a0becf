# make demo: set up, restore a real clip.  make test: set up, check, test.  Both may be repeated.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
READY := .venv/.ready

.PHONY: demo test check judges clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: check judges
	$(BIN)/python -m pytest

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
