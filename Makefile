# Every target prepares .venv by itself and is quick the second time. On a machine without a GPU, install the CPU
# build of torch into .venv first if your package index serves it; otherwise the default build is fetched.
PYTHON ?= python3
PY := .venv/bin/python
SOURCES := $(shell find csrc -type f)
# Each worker starts with half of the files in a row, and takes from the other when it is done.
TEST_OPTIONS ?= -n 2 --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench docs gpu lint wheel clean

demo: .venv/native
	$(PY) -m tersor.models.train_digits --output demo
	$(PY) -m tersor.models.write_photographs demo/photographs
	$(PY) -m tersor compress --model resnet20 --option in_chans=1 --data demo/photographs --size 24 \
	    --recipe docs/recipe.toml --epochs 8 --output demo/small
	$(PY) -m tersor infer demo/small/model.safetensors --top 2 \
	    demo/photographs/test/brick/0000.png demo/photographs/test/coins/0000.png demo/photographs/test/moon/0000.png

# Two workers of two threads each on two cores: waiting threads sleep, since spinning takes half of the time.
test: export OMP_WAIT_POLICY := PASSIVE
test: .venv/native
	OMP_NUM_THREADS=2 $(PY) -m pytest $(TEST_OPTIONS) tests
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest $(TEST_OPTIONS) -k triton \
	    tests/attention tests/binary tests/freezing tests/quantization tests/sparsity tests/tokens \
	    tests/test_conformance.py tests/test_parity.py

bench: .venv/native
	$(PY) bench/run.py

# The site, into build/docs; a warning is an error. The build itself needs no network.
docs: .venv/native
	rm -rf build/docs
	$(PY) -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "open build/docs/index.html"

# On a CUDA machine, with the python that holds its torch (no virtual environment, no network).
gpu:
	$(PYTHON) bench/gpu.py

lint: .venv/native
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	mkdir -p build/mypy/tersor  # the folders under the one import name that the type checker has to see
	ln -sfn $(CURDIR)/pyops/* $(CURDIR)/models $(CURDIR)/triton_kernels build/mypy/tersor/
	MYPYPATH=build/mypy $(PY) -m mypy -p tersor

# One wheel for every Python and torch that pyproject.toml allows: the operators need neither's headers at run time. The
# introspection module is in it for the running CPython and those of PYTHONS that are installed with headers.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
wheel: .venv/native
	rm -rf build/lib* build/wheel  # where files that are gone from the sources would still lie
	TERSOR_PYTHONS="$(PYTHONS)" $(PY) -m pip wheel -v --no-build-isolation --no-deps -w build/wheel . 2>&1 | grep "tersor: "
	$(PY) -m wheel tags --remove --python-tag py3 --abi-tag none build/wheel/*.whl
	PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m auditwheel repair --exclude "libtorch*" --exclude "libc10*" -w dist build/wheel/*.whl

clean:
	rm -rf build dist *.egg-info docs/api pyops/*.so pyops/_build.json

# torch comes first and alone, so that no other requirement picks its version. The C++ is built once, in the next rule.
.venv/ready: constraints.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch setuptools wheel pybind11
	TERSOR_NATIVE=0 $(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

.venv/native: .venv/ready $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@
