# Everything runs in .venv, which the first target that needs it creates.
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3

.PHONY: demo test test-hostile test-numerics test-engines test-gpu test-quantized test-browser docs check check-pythons bench sweep format clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The packages of an extra alone: the project stands, and need not be built again.
EXTRA = import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
define install-extra
	$(PY) -c '$(EXTRA)' $(1) > $@.txt
	$(PY) -m pip install --quiet --constraint constraints.txt $(2) --requirement $@.txt
	@touch $@
endef

demo: $(VENV)/.ready
	@$(VENV)/bin/trilens demo --report demo.html

# One process a core, one thread each: the models are too small for more.
# `make test LESS="--ignore tests/hostile"` leaves out what `test-hostile` runs whole.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(LESS)

# Damaged and hostile input, interrupts at every line, growth over thousands of captures: all of
# it, of which `test` runs a small part.
test-hostile: $(VENV)/.ready
	TRILENS_HOSTILE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal tests/hostile

# What depends on who adds up, once more, as a processor without AVX does it, on two threads: torch,
# oneDNN, MKL, OpenBLAS, NumPy and numba each have a switch of their own. numba is left the
# conversions of half precision (F16C), which its loops cannot do without.
NUMERICS := tests/statistics tests/caches tests/ternary/calibrated tests/ternary/packed \
	tests/ternary/test_rotation.py tests/evaluation tests/training tests/lens tests/analysis/comparison \
	tests/planning/test_calibrated_candidates.py::test_hessians_are_those_of_the_inputs \
	tests/planning/test_predictor.py tests/models/test_anatomy.py tests/models/rwkv7/test_kernels.py
BASELINE := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
ifeq ($(shell uname -m),x86_64)
BASELINE += ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
	OPENBLAS_CORETYPE=Nehalem NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4" \
	NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=+f16c
endif

# What torch's compiler writes needs vector types that this capability has not.
UNCOMPILED := --deselect tests/lens/test_wrapped.py::test_flex_attention_gives_all_but_its_patterns

test-numerics: $(VENV)/.ready
	$(BASELINE) $(PY) -m pytest -n auto --dist worksteal $(UNCOMPILED) $(NUMERICS)

# llama.cpp is built from its source package: a C++ compiler, and about four minutes of one core.
$(VENV)/.engines: $(VENV)/.ready
	$(call install-extra,engines,--no-binary llama-cpp-python)

test-engines: $(VENV)/.engines
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal tests/engines

$(VENV)/.gpu: $(VENV)/.ready
	$(call install-extra,gpu)

# Without a GPU in Triton's interpreter.
test-gpu: $(VENV)/.gpu
	$(PY) -m pytest tests/gpu

# Libraries that quantize, in an environment of their own on top: transformers imports whatever of
# them it finds, and every other test is to run without them.
QUANTIZED := $(VENV)/quantized
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
$(QUANTIZED)/.ready: $(VENV)/.ready
	$(PY) -m venv --without-pip $(QUANTIZED)
	$(PY) -c '$(SITE)' > "$$($(QUANTIZED)/bin/python -c '$(SITE)')/base.pth"
	$(PY) -m pip --python $(QUANTIZED)/bin/python install --quiet --constraint constraints.txt --editable '.[quantized]'
	@touch $@

test-quantized: $(QUANTIZED)/.ready
	$(QUANTIZED)/bin/python -m pytest -W default tests/quantized

# A Chromium of the system (apt-get install chromium), without which `test` skips these.
$(VENV)/.browser: $(VENV)/.ready
	$(call install-extra,browser)

# The site's search is one of the tests.
build/site/index.html:
	$(MAKE) docs

test-browser: $(VENV)/.browser build/site/index.html
	TRILENS_BROWSER=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal tests/browser

$(VENV)/.docs: $(VENV)/.ready
	$(call install-extra,docs)

# The docs as a site that needs no network: build/site/index.html opens from disk.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --config-file website/mkdocs.yml
	$(PY) -m pytest tests/site

# Other Pythons of this machine, without torch.
check-pythons:
	.ci/pythons

check: $(VENV)/.ready
	$(VENV)/bin/ruff format --check src tests benchmarks training examples website
	$(VENV)/bin/ruff check src tests benchmarks training examples website
	$(VENV)/bin/mypy & mypy=$$!; $(VENV)/bin/pyright --pythonpath $(PY); found=$$?; wait $$mypy && exit $$found

format: $(VENV)/.ready
	$(VENV)/bin/ruff format src tests benchmarks training examples website
	$(VENV)/bin/ruff check --fix src tests benchmarks training examples website

bench: $(VENV)/.ready
	$(PY) -m benchmarks

sweep: $(VENV)/.ready
	$(PY) -m benchmarks.families
	$(PY) -m benchmarks.mappings

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
