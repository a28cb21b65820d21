# `make up` builds Minke and starts a cluster; `make test` is all of CI. Both install the Debian packages they
# need when they may, and name them when they may not.

CARGO ?= cargo
BUILD_NEEDS := gcc libseccomp-dev pkg-config nftables
TEST_NEEDS := busybox-static ca-certificates conntrack curl docker-registry iproute2 openssl procps python3-pip runc

.PHONY: up down build needs test-needs test unit scenarios crash bench clean

up: build
	./target/release/minke up

down:
	./target/release/minke down

build: needs
	$(CARGO) build --release --locked -p minke

needs:
	@tests/tools/need $(BUILD_NEEDS)

test-needs: needs
	@tests/tools/need $(TEST_NEEDS)

# Everything, with a count at the end.
test: test-needs
	@CARGO="$(CARGO)" tests/run

# Only the unit tests.
unit: needs
	$(CARGO) test --locked --workspace

# Only the scenarios; NAMES chooses some, KUBECTL another kubectl.
scenarios: test-needs
	$(CARGO) build --locked -p minke -p minke-scenarios
	KUBECTLS="$$(tests/tools/kubectls)" target/debug/scenarios $(NAMES)

# The long form of the crash scenario: 50 times kill -9 of the server.
crash: test-needs
	$(CARGO) build --locked -p minke -p minke-scenarios
	target/debug/crash --rounds 50

# The budgets, measured. ARGS are passed on: make bench ARGS=--help
bench: needs
	@CARGO="$(CARGO)" bench/run $(ARGS)

clean:
	$(CARGO) clean
