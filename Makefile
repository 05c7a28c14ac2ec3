# make demo     from nothing to the measured crossover: set-up, then bench/crossover/command.py --quick
# make test     set-up, then the first tier of the tests: under 8 minutes on two cores
# make test-all the first tier, then what it leaves out: test-slow (second looks, minutes of training, installs, several
#               processes) and interpreter (the Triton kernels, interpreted)
# make bench    time the kernels (pytest --benchmark)
# make gpu      every test and measurement for a CUDA device, under 9 minutes (REHEARSE=1: the same on the CPU, tiny)
# make triton36 the kernels' gate and their tests in the interpreter, with Triton 3.6.0 instead of the one that is there
# make transformers4  the Hugging Face integration with transformers 4.57 instead of the one that is there
# make lint     ruff, formatting, import contract        make types    mypy, strict but for Triton kernels
# make lint-cpp clang-format and clang-tidy over the C++ sources, a quarter of a minute
# make docs     the site into build/docs                 make clean    remove builds and caches, not runs
#
# PYTHON names the interpreter (python3), VENV the environment (.venv). NOVENV=1 installs nothing and runs PYTHON as it
# is, for machines without a network that already have torch and pytest. ARGS goes to pytest, the crossover or
# bench/gpu/command.py.

PYTHON ?= python3
VENV ?= .venv
# Used when no torch is there yet; one that is there is never replaced.
TORCH ?= torch==2.13.0

ifdef NOVENV
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(abspath $(VENV))/bin/python
READY := $(abspath $(VENV))/.ready
endif

NATIVE := CMakeLists.txt $(wildcard $(foreach depth,* */* */*/* */*/*/*,kernels/$(depth).cpp kernels/$(depth).hpp))
CXX_FILES := $(filter %.cpp %.hpp,$(NATIVE)) $(wildcard tests/kernels/native/*.?pp)
ROOMS := kernels autoencoders rnn bench

.PHONY: demo test test-slow test-all interpreter bench gpu triton36 transformers4 lint lint-cpp contract types docs
.PHONY: clean setup tree
.DEFAULT_GOAL := test

demo: $(READY)
	$(PY) bench/crossover/command.py --quick $(ARGS)

# One worker a core, two at least, where pytest-xdist is there. ARGS come last and win: make test ARGS="-n 0 -k names".
TEST = $(PY) -m pytest $(if $(shell $(PY) -c 'import xdist' 2>&1),,-n auto --dist $(DIST)) --durations=20
DIST := worksteal

test: $(READY)
	$(TEST) $(ARGS)

# A file stays with one worker, which then builds the distributions, and the like, once.
test-slow: DIST := loadfile
test-slow: $(READY)
	$(TEST) -m 'slow or install or torchrun' $(ARGS)

interpreter: $(READY)
	TRITON_INTERPRET=1 $(TEST) tests/kernels -k triton $(ARGS)

test-all: test test-slow interpreter

bench: $(READY)
	$(PY) -m pytest --benchmark $(ARGS)

gpu: $(READY)
	$(PY) bench/gpu/command.py $(if $(REHEARSE),--rehearse) $(ARGS)

# A folder of packages ahead of the environment's own. Triton 3.6's interpreter cannot count with numpy 2.4, and makes
# scalars of arrays in a way that older ones warn of.
TRITON36 := $(CURDIR)/.triton36
triton36: export PYTHONPATH := $(TRITON36)$(if $(PYTHONPATH),:$(PYTHONPATH))
triton36: $(TRITON36)/.ready
	$(PY) -m pytest -m 'slow or not slow' tests/bench/codegen/test_gate.py $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -W 'ignore:Conversion of an array with ndim:DeprecationWarning' \
	  $(wildcard tests/kernels/*/test_triton*.py tests/kernels/test_*triton*.py) $(ARGS)

$(TRITON36)/.ready: | $(READY)
	$(PY) -m pip install --upgrade --no-deps --target $(TRITON36) triton==3.6.0 'numpy<2.4'
	@touch $@

# The last release before transformers 5, with what it needs of other versions than 5 does.
TRANSFORMERS4 := $(CURDIR)/.transformers4
transformers4: export PYTHONPATH := $(TRANSFORMERS4)$(if $(PYTHONPATH),:$(PYTHONPATH))
transformers4: $(TRANSFORMERS4)/.ready
	$(PY) -m pytest tests/linattn/integrations/test_hf.py $(ARGS)

$(TRANSFORMERS4)/.ready: | $(READY)
	$(PY) -m pip install --upgrade --no-deps --target $(TRANSFORMERS4) transformers==4.57.6 'huggingface_hub<1' 'tokenizers<0.23'
	@touch $@

lint: contract
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# clang-tidy sees each source once: as the portable set, or as AMX where that is all there is. Without OpenMP, whose
# header clang brings along only where it is installed as a compiler.
CLANG_TIDY := clang-tidy==23.1.4
executable = $$($(PY) -c 'import $(1); print($(1).get_executable("$(2)"))')
lint-cpp: $(READY)
	"$(call executable,clang_format,clang-format)" --dry-run --Werror $(CXX_FILES)
	$(PY) -c 'import clang_tidy' 2>/dev/null || $(PY) -m pip install $(CLANG_TIDY)
	cmake -S . -B build/lint -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON -DLINATTN_INSTRUCTION_SETS=portable -DLINATTN_CHECKED=ON -DLINATTN_TESTS=ON \
	  -DPython_EXECUTABLE=$(PY) -Dnanobind_DIR=$$($(PY) -c 'import nanobind; print(nanobind.cmake_dir())')
	$(PY) "$(call executable,clang_tidy,run-clang-tidy.py)" -quiet -p build/lint \
	  -clang-tidy-binary "$(call executable,clang_tidy,clang-tidy)" '/kernels/.*\.cpp$$'

# -S leaves out .pth files and with them the import hook of an editable install, which would hide the tree.
contract: $(READY) tree
	cd .types && PYTHONPATH="$$($(PY) -c 'import sys; print(":".join(sys.path))')" $(PY) -S -c \
	  'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports("../pyproject.toml", cache_dir="../.import_linter_cache", no_logo=True))'

types: $(READY) tree
	cd .types && $(PY) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache

docs: $(READY) tree
	$(PY) -c 'import mkdocs, mkdocstrings, latex2mathml, material' 2>/dev/null || $(PY) -m pip install 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1' 'latex2mathml>=3.78'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf build dist .triton36 .transformers4 .types .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

setup: $(READY)

# The package as it is laid out once installed, out of links: what static tools need to see.
tree:
	@rm -rf .types && mkdir -p .types/linattn
	@ln -s $(addprefix ../../,$(filter-out %__pycache__,$(wildcard linattn/*)) $(ROOMS)) .types/linattn/

ifndef NOVENV
$(PY):
	@$(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv --system-site-packages --without-pip --clear $(VENV)
	@$(PY) -m pip --version || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) can make no environment with pip; install its venv and pip (Debian: apt install python3-venv)"; exit 1; }

$(READY): pyproject.toml $(NATIVE) | $(PY)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e '.[dev]'
	@touch $@
endif
