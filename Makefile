# Each target works alone on a fresh machine with python3, g++, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two ranks on two cores: more threads in each only fight.
export OMP_NUM_THREADS ?= 1
# Of tests at a time. A test's ranks wait for each other much of the time; two tests keep two cores busy.
TEST_PROCESSES ?= 2

.PHONY: demo test test-slow test-nccl test-transports reliability soak gpu-check lint bench bench-block clean

demo: $(VENV)/ready
	@echo "== demo: a Wan transformer, sequence-parallel on 2 CPU ranks, compiled whole"
	$(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 examples/wan_sequence_parallel.py $(DEMO_ARGS)

test: $(VENV)/ready
	@echo "== test: tests/ and compile_tests/, without those marked slow"
	$(BIN)/python -m pytest -m "not slow" --durations=15 --numprocesses $(TEST_PROCESSES) --dist worksteal

test-slow: $(VENV)/ready
	@echo "== test-slow: what takes minutes or gigabytes"
	FVOPS_RANDOM_PROGRAMS=$${FVOPS_RANDOM_PROGRAMS:-200} $(BIN)/python -m pytest -m "slow or fault" --durations=10

# The wheel's name carries a CUDA version, but nothing here needs CUDA; --no-deps keeps its packages away.
NCCL := build/nccl/nvidia/nccl/lib/libnccl.so.2

test-nccl: $(VENV)/ready $(NCCL)
	@echo "== test-nccl: the bindings against the real libnccl and its header; no GPU needed"
	FVOPS_NCCL_LIBRARY=$(NCCL) $(BIN)/python -m pytest -m nccl tests/test_nccl_library.py

$(NCCL):
	$(BIN)/python -m pip install --quiet --no-deps --target build/nccl nvidia-nccl-cu12

OP_SUITE := tests/test_data_movement.py tests/test_reductions.py tests/test_coalesced.py tests/test_gradients.py \
	tests/test_point_to_point.py tests/test_debug.py tests/test_warmup.py tests/test_large.py

test-transports: $(VENV)/ready
	@echo "== test-transports: the op suite and compile_tests over gloo and over the doubles of NCCL and HCCL"
	FVOPS_TEST_TRANSPORT=process_group $(BIN)/python -m pytest -m "not slow" $(OP_SUITE) compile_tests
	FVOPS_TEST_TRANSPORT=nccl $(BIN)/python -m pytest -m "not slow" $(OP_SUITE)
	FVOPS_TEST_TRANSPORT=hccl $(BIN)/python -m pytest -m "not slow" $(OP_SUITE)

reliability: $(VENV)/ready
	@echo "== reliability: all faults of tests/fault_table.py, and the matrix in docs/reliability.md"
	-$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --junit-xml=build/faults.xml tests/test_faults.py
	$(BIN)/python -m tools.reliability_matrix build/faults.xml

soak: $(VENV)/ready
	@echo "== soak: mixed work for FVOPS_SOAK_S seconds (600); memory, descriptors, threads, segments flat at the end"
	$(BIN)/python -m tools.soak

# With a Python that has a CUDA build of torch, not with .venv; without a network. See tools/gpu_check.py.
gpu-check:
	@echo "== gpu-check: GPU tests and the kernels' speed; exit code 3 (make says 2) where there is no GPU"
	$(PYTHON) tools/gpu_check.py

lint: $(VENV)/ready
	@echo "== lint: ruff check, ruff format, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	@echo "== bench: what a call costs, all candidates in turn in one run"
	$(BIN)/python tools/bench_dispatch.py
	$(BIN)/python -m tools.bench_collectives $(BENCH_ARGS)

bench-block: $(VENV)/ready
	@echo "== bench-block: a compiled attention block by fvops and by others, and what compiling costs; under 10 minutes"
	$(BIN)/python -m tools.must_show $(BLOCK_ARGS)

$(VENV)/ready: pyproject.toml constraints.txt $(wildcard fvops/device_communicators/shm/*.[ch])
	@echo "== creating $(VENV) (once): torch, then fvops with what its tests, demo and benchmarks need"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	@# torch by its exact version first: nothing later may choose another build of it.
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,demo,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
