# each goes to smbench only where it is set
option  = $(if $($(1)), --$(2) '$($(1))')
options = $(call option,PROFILE,profile)$(call option,OUT,out)$(call option,ARCH,arch)$(call option,STACK,stack)$(call option,MODEL,model)$(call option,PRICE,price)$(call option,SHAREGPT,sharegpt)$(call option,TRACE,trace)
python  = .venv/bin/python

# for bench/setup.sh: TORCH_INDEX_URL, an index for torch alone; WHEELHOUSE, a folder of wheels looked at first
export TORCH_INDEX_URL WHEELHOUSE PYTHON

# for smbench.images, each only where it is set
image_options = $(call option,ARCH,arch)$(call option,STACK,stack)$(call option,BASE_IMAGE,base-image)$(call option,WHEELHOUSE,wheelhouse)$(call option,TORCH_INDEX_URL,torch-index-url)$(call option,CA_BUNDLE,ca-bundle)$(call option,APT_CONF,apt-conf)$(call option,APT_SOURCES,apt-sources)$(call option,STRIP,strip)$(call option,SBOM,sbom)$(if $(NO_CACHE), --no-cache)$(if $(DRY_RUN), --dry-run)
# for smbench.kvcache
trtllm_options = $(call option,ARCH,arch)$(call option,WHEELHOUSE,wheelhouse)$(call option,CA_BUNDLE,ca-bundle)$(if $(DRY_RUN), --dry-run)

.PHONY: help setup ready stack image kvcache-image images-size dockerfiles run push rerun tune test check locks

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: ## Make .venv [TORCH_INDEX_URL= WHEELHOUSE= PYTHON=]; every other target does so first
	@sh bench/setup.sh

# WHEELHOUSE and TORCH_INDEX_URL are for the image or the stack here: a whole .venv is not made anew for them
ready:
	@env -u WHEELHOUSE -u TORCH_INDEX_URL $(python) -E -s -S -B bench/setup_venv.py --fresh 2>/dev/null || sh bench/setup.sh

stack: ready ## Make .stacks/STACK, where an engine runs with no image: STACK= [ARCH= TORCH_INDEX_URL= WHEELHOUSE=]
	@$(python) -E -s -S -B bench/setup_stack.py '$(STACK)'$(call option,ARCH,arch)

image: ready ## Build an image: ARCH= [STACK= BASE_IMAGE= WHEELHOUSE= TORCH_INDEX_URL= CA_BUNDLE= STRIP=0 SBOM= DRY_RUN=1]
	@$(python) -m $(if $(filter trtllm,$(STACK)),smbench.kvcache trtllm$(trtllm_options)$(call option,BASE_IMAGE,base-image),smbench.images build$(image_options))

kvcache-image: ready ## Build document 003's TensorRT-LLM: ARCH= BASE_DIGEST= TENSORRT_LLM_COMMIT= [SOURCE_DIR= MAX_JOBS= FORCE=1 DRY_RUN=1]
	@$(python) -m smbench.kvcache kvcache$(trtllm_options)$(call option,BASE_DIGEST,base-digest)$(call option,TENSORRT_LLM_COMMIT,tensorrt-llm-commit)$(call option,RECSYS_EXAMPLES_COMMIT,recsys-examples-commit)$(call option,SOURCE_DIR,source-dir)$(call option,MAX_JOBS,max-jobs)$(if $(FORCE), --force)

images-size: ready ## What each image built here takes on disk [PULL=1: and to pull, in minutes]
	@$(python) -m smbench.images sizes$(if $(PULL), --pull)

dockerfiles: ready ## Render docker/*.Dockerfile from Dockerfile.j2 and archs.toml
	@$(python) -m smbench.images dockerfiles

run: setup ## Measure a recipe and write its report: RECIPE= [PROFILE= OUT= ARCH= STACK= MODEL= PRICE= SHAREGPT= TRACE=torch|nsys WHERE=docker|here FORCE=1 DRY_RUN=1]
	@.venv/bin/smbench launch '$(RECIPE)'$(options)$(call option,WHERE,where)$(if $(FORCE), --force)$(if $(DRY_RUN), --dry-run)

push: ready ## Push images and say their digests: REGISTRY= [ARCH= STACK= AS_ROOT=1]
	@.venv/bin/smbench push --registry '$(REGISTRY)'$(call option,ARCH,arch)$(call option,STACK,stack)$(if $(AS_ROOT), --as-root)

rerun: setup ## Repeat a colleague's run here and compare: BUNDLE= [PROFILE= OUT=]
	@.venv/bin/smbench rerun '$(BUNDLE)'$(call option,PROFILE,profile)$(call option,OUT,out)

tune: setup ## Search launch parameters for the points a recipe measures: RECIPE= [PROFILE= OUT=]
	@.venv/bin/smbench tune '$(RECIPE)'$(options)

test: setup ## Run the tests [ARGS=, for pytest]
	@$(python) tests $(ARGS)

check: setup ## Formatting, lint, the dependency rule, types
	@sh bench/check.sh

locks: setup ## Resolve requirements.lock and docker/locks again [ARGS=--upgrade, for uv]
	@sh bench/locks.sh $(ARGS)
