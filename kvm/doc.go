// Package kvm is a typed interface to the kernel's KVM API on linux/amd64: one
// method for each ioctl, and plain structs for the state that a migration sends.
//
// A [System] is /dev/kvm. It creates a [VM], which has memory slots, a dirty log,
// interrupt chips and a clock. A VM creates a [VCPU], which runs the guest and has
// registers. The package does not know what a machine consists of: other packages
// choose slots, ports and devices.
//
// # Errors
//
// The error of a call names the ioctl, its object and its arguments, and wraps the
// errno, so that errors.Is(err, unix.EINVAL) works.
// Arguments whose size the kernel does not check, such as bitmaps, are checked
// before the call; the error is EINVAL too. What this host's KVM does not support
// is errors.ErrUnsupported. Every call is repeated after EINTR, which Go's
// preemption signals cause, except [VCPU.Run], which returns it for a kick.
//
// # Concurrency
//
// Methods may be called from several goroutines at once. In the kernel, calls on a
// vCPU wait for its KVM_RUN to end; [VCPU.SetImmediateExit] and [VCPU.Kick] do not.
// Only the thread that runs the vCPU may call [VCPU.Run] and the methods that
// decode an exit. Close must be the last call on a value, except that Kick and
// SetImmediateExit may follow it.
//
// # What is used of gokvm
//
// From github.com/bobuhiro11/gokvm/kvm: the builders of ioctl numbers, the
// capability type and its constants, and four structs
// that are not saved: UserspaceMemoryRegion, RunData, MPState, Translation. Its
// functions that pass no pointer: KVM_GET_API_VERSION, KVM_CREATE_VM,
// KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU,
// KVM_CREATE_IRQCHIP, KVM_SET_TSS_ADDR, KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ.
//
// Not from gokvm:
//
//   - Calls that pass a pointer. gokvm's Ioctl takes the address as an uintptr
//     through an ordinary Go function: neither the garbage collector nor a growing
//     stack knows of it.
//   - KVM_RUN: gokvm turns EINTR and EAGAIN into success, so a kicked vCPU looks
//     like one that has exited.
//   - KVM_GET_DIRTY_LOG: gokvm turns ENOENT into success and does not check the
//     bitmap's length. KVM_SET_IDENTITY_MAP_ADDR: it passes four of the eight bytes
//     that the kernel reads.
//   - KVM_SET_GSI_ROUTING: gokvm's entries have 24 bytes, the kernel's have 48.
//     KVM_SET_MSRS: gokvm drops the number of MSRs that were written.
//     KVM_CREATE_PIT2: no flags.
//   - The structs of a saved machine: their fields' names are part of the format
//     and must not change with a library. A test compares the layout of all
//     structs with the kernel's headers.
//   - What gokvm lacks: KVM_CLEAR_DIRTY_LOG, KVM_ENABLE_CAP, the dirty ring,
//     KVM_IRQFD, KVM_IOEVENTFD, XSAVE and XSAVE2, device attributes (TSC offset,
//     XCOMP), KVM_KVMCLOCK_CTRL, exit reasons above 17.
package kvm

import _ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
