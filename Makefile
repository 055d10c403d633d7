# The commands of development, in an environment that has torch and the extra "test" (pip install ".[test]"):
#
#   make style      formatters, linters, types
#   make test       every test
#   make docs       the site, into build/site, a warning being an error; then links, files that are named, blocks of code
#                   and the examples. Needs the extra "docs", which "test" brings.
#   make reference  the pages of docs/guide that follow from the package: fields and presets, types of models
#   make bench      every op and whole sequences, timed against their baselines
#   make sanitize   the tests of the compiled ops under AddressSanitizer and UndefinedBehaviorSanitizer: the first
#                   access outside of an array, use of freed memory or undefined step ends the run with its line.
#                   Builds into build/sanitize, beside the extension in d4s/ops/, which stays as it is. Needs g++,
#                   cmake 3.26 and ninja (pip install cmake ninja).
#
# PYTHON is the interpreter, CHECKED the test files of `make sanitize`.

PYTHON ?= python
SANITIZED := $(CURDIR)/build/sanitize
CHECKED ?= ops/test_ops.py change/test_weights.py change/test_closed_form.py

.PHONY: style test docs reference bench sanitize

style:
	$(PYTHON) -m pytest -q python_tests/test_style.py

test:
	$(PYTHON) -m pytest -n auto

docs:
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs build/site
	$(PYTHON) -m pytest -q python_tests/test_docs.py python_tests/test_doc_blocks.py python_tests/test_site.py python_tests/test_examples.py

reference:
	$(PYTHON) docs/reference.py

bench:
	$(PYTHON) -m pytest benchmarks --benchmark-enable

# Python has loaded no sanitizer when it loads the extension, so they are preloaded, and libstdc++ with them,
# whose exceptions they follow. Leaks are not looked for: Python and torch leave memory to the end of the process.
# capture=sys: their report goes past Python, and pytest would take it along when it ends.
sanitize:
	cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_CXX_COMPILER=$(CXX) -DD4S_SANITIZE=ON -DD4S_CUDA=OFF \
	  -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)')
	cmake --build $(SANITIZED)
	for part in d4s/* d4s/ops/*; do case $$part in d4s/ops | *.so | *__pycache__) ;; *) ln -sfn $(CURDIR)/$$part $(SANITIZED)/$$part ;; esac; done
	cd $(SANITIZED) && \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  $(PYTHON) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider --capture=sys \
	  $(CHECKED:%=$(CURDIR)/python_tests/%)
