# govmm: make, make demo, make check, make test; make help lists the rest.

VERSION := $(shell git describe --always --dirty --tags 2>/dev/null)
FUZZTIME ?= 5
TURNS ?= 5
DIST ?= dist

.DEFAULT_GOAL := build
.NOTPARALLEL:
.PHONY: site build deb dist demo check test accept setup lint unit model fuzz bench compare-hints test-kernel guest clean help test-svm emulated

build: ## bin/govmm: static, with the version from git
	CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags '-s -w -X main.gitVersion=$(VERSION)' -o bin/govmm ./cmd/govmm

deb: build ## the Debian package, in DIST (docs/package.md)
	packaging/deb.sh $(DIST)

dist: build ## what is released, in DIST: the binary, the package, an SBOM, checksums
	packaging/dist.sh $(DIST)

deb dist: export GOAMD64 = v1
deb dist: export GOFLAGS =

demo: build ## migrate a guest between two processes here
	bin/govmm demo

check: lint ## what to run before each commit: needs neither root, nor KVM, nor a network
	go test -short ./...

test: setup lint unit model fuzz ## everything CI runs, set-up included (Debian 12 with Go)
	@if [ "$$(. /etc/os-release && echo $$ID$$VERSION_ID)" = debian12 ]; then $(MAKE) guest; fi

accept: export GOVMM_ACCEPT = 1
accept: setup ## the long runs of what CI runs in short, the package installed and released
	go run ./test/run -tags accept -count=1 -timeout 180m ./test/...
	go test -count=1 -run NoPageIsLost -timeout 30m ./migrate -rapid.checks=5000
	go test -count=1 -run HintEpochsLoseNothing -v -timeout 30m ./migrate -sched.steps=20000000

setup: ## install what the tests need
	test/setup.sh

lint: ## gofmt, go vet, staticcheck, go.mod
	@test -z "$$(gofmt -l .)" || { echo "gofmt these:"; gofmt -l .; exit 1; }
	go vet ./...
	go vet -tags svm ./test/svm
	go vet -tags accept ./test
	go vet -tags manpages ./cmd/govmm
	go tool staticcheck ./...
	go mod tidy -diff

unit: ## the tests, under the race detector; where /dev/kvm opens none may be skipped
	go run ./test/run -race -p 1 -timeout 60m ./...

emulated: ## some tests on KVM in an emulated machine, where there is no /dev/kvm
	go run ./test/run -svm=absent

test-svm: ## many more of them, on any machine with QEMU
	go test -tags svm -count=1 -run TestMachine -timeout 15m ./test/svm
	go run ./test/run -svm

model: ## spin visits every state of hints, handoff and missing (a few minutes, under 2 GiB)
	go run ./test/model

fuzz: ## every fuzz target for FUZZTIME seconds
	test/fuzz.sh $(FUZZTIME)

bench: ## speeds, beside the peers that are here (docs/benchmarks.md); TURNS of each of the long ones
	go test -run '^$$' -bench . -skip 'MigrateIdle|Start|Linux|CompareHints' -benchtime $(TURNS)x -timeout 180m ./test
	go test -run '^$$' -bench 'MigrateIdle|Start' -benchtime 20x -timeout 60m ./test
	go test -run '^$$' -bench 'Linux' -benchtime 1x -timeout 60m ./test
	go test -run '^$$' -bench DowntimeLimit -benchtime 100x -timeout 60m ./migrate/simtest
	go test -run '^$$' -bench . -skip DowntimeLimit -p 1 -timeout 60m $$(go list ./... | grep -v '/test$$')

compare-hints: ## what QEMU and govmm lose of a guest that rewrites what it hints; GOVMM_ACCEPT=1: 100 migrations each
	go test -count=1 -run '^$$' -bench CompareHints -benchtime 1x -timeout 300m ./test

test-kernel: ## build the Linux test kernel into the user's cache, if it is not there
	test/kernel/build.sh noacpi
	test/kernel/build.sh acpi
	test/kernel/build.sh poison
	test/kernel/build.sh disk

guest: ## rebuild the demo guest; fails if the committed binary differs
	$(MAKE) -C guest check

site: ## the manual as HTML, in bin/site
	go run ./test/site bin/site

clean: ## remove what was built
	rm -rf bin dist
	$(MAKE) -C guest clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
