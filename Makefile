# each goes to smbench only where it is set
option  = $(if $($(1)), --$(2) '$($(1))')
options = $(call option,PROFILE,profile)$(call option,OUT,out)$(call option,ARCH,arch)$(call option,STACK,stack)$(call option,MODEL,model)$(call option,PRICE,price)
python  = .venv/bin/python

# for bench/setup.sh: TORCH_INDEX_URL, an index for torch alone; WHEELHOUSE, a folder of wheels looked at first
export TORCH_INDEX_URL WHEELHOUSE PYTHON

.PHONY: help setup run rerun tune test check locks

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: ## Make .venv [TORCH_INDEX_URL= WHEELHOUSE= PYTHON=]; every other target does so first
	@sh bench/setup.sh

run: setup ## Measure a recipe and write its report: RECIPE= [PROFILE= OUT= ARCH= STACK= MODEL= PRICE=]
	@.venv/bin/smbench run '$(RECIPE)'$(options)

rerun: setup ## Repeat a colleague's run here and compare: BUNDLE= [PROFILE= OUT=]
	@.venv/bin/smbench rerun '$(BUNDLE)'$(call option,PROFILE,profile)$(call option,OUT,out)

tune: setup ## Search launch parameters for the points a recipe measures: RECIPE= [PROFILE= OUT=]
	@.venv/bin/smbench tune '$(RECIPE)'$(options)

test: setup ## Run the tests [ARGS=, for pytest]
	@$(python) tests $(ARGS)

check: setup ## Formatting, lint, the dependency rule, types
	@sh bench/check.sh

locks: setup ## Resolve requirements.lock again [ARGS=--upgrade, for uv]
	@sh bench/locks.sh $(ARGS)
