package main

import "testing"

// TestModuleParameters: a module gets its own parameters from the kernel's command line,
// and no others.
func TestModuleParameters(t *testing.T) {
	const cmdline = "quiet kvm.halt_poll_ns=0 kvm_amd.npt=0 panic=-1 kvm_amd.vls=0\n"
	for file, want := range map[string]string{
		"/modules/14-kvm_amd.ko":    "npt=0 vls=0",
		"/modules/12-kvm.ko":        "halt_poll_ns=0",
		"/modules/11-irqbypass.ko":  "",
		"/modules/99-npt=0.ko":      "",
		"/modules/05-virtio_net.ko": "",
	} {
		if got := moduleParameters(cmdline, file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
}
