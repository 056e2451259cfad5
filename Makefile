# install: .venv with everything; demo: the whole path on real code; test: what CI runs; emulate: the
# tests of the ops that would run on a GPU, compiled for two of them and run by tests/ops/ptx_machine.
# DATA="folder ..." gives `make demo` other sources than this Python's standard library. The shell
# reads it, so a path with spaces is quoted once more: DATA="'my code' other" OUTPUT="runs/my code".

PYTHON ?= python3
VENV := .venv
DATA ?=
OUTPUT ?= runs/demo
INSTALLED := $(VENV)/installed
TRITON_3_6 := $(VENV)/triton-3.6.0

.PHONY: install demo test emulate lint clean

install: $(INSTALLED)

# Built again when the packaging or the C++ sources change; Python sources are used in place.
# The build has an environment of its own, which -c does not reach: older versions of pip pin it by
# PIP_CONSTRAINT, newer ones by PIP_BUILD_CONSTRAINT.
$(INSTALLED): Makefile setup.py pyproject.toml constraints.txt $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.cpp)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	touch $@

demo: install
	$(VENV)/bin/stellarator demo $(DATA) --output "$(OUTPUT)"

# The oldest Triton that is supported: one test compiles with it, and fails where it is not right.
$(TRITON_3_6): | $(INSTALLED)
	rm -rf $@ $@.part
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $@.part triton==3.6.0
	mv $@.part $@

test: install $(TRITON_3_6)
	STELLARATOR_TRITON_3_6="$(CURDIR)/$(TRITON_3_6)" \
		$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10

emulate: install
	for arch in sm_80 sm_90; do \
		STELLARATOR_EMULATED_GPU=$$arch $(VENV)/bin/python -m pytest -q -n 2 tests/ops || exit 1; \
	done

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info kernels/stellarator_kernels/*.so
