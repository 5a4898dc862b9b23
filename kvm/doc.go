// Package kvm is the kernel's KVM API, typed: what /dev/kvm offers to a
// hypervisor on linux/amd64, one method for each ioctl, plain structs for the
// state that a migration carries.
//
// A [System] is /dev/kvm. It makes a [VM], which has memory slots, a dirty log,
// interrupt chips and a clock; a VM makes a [VCPU], which runs the guest and has
// registers. Nothing here knows what a machine looks like: which slots, ports
// and devices there are is for the packages above.
//
// # Errors
//
// A call that the kernel refuses returns an [*OpError], which names the ioctl
// and what it was about and wraps the errno, so that errors.Is(err, unix.EINVAL)
// works. Arguments whose size the kernel would trust (bitmaps above all) are
// checked before the kernel sees them, and refused the same way with EINVAL. What this
// kernel's KVM cannot do is reported as errors.ErrUnsupported. EINTR is retried
// in every call (Go's preemption signals cause it, in KVM_CREATE_VM for one) but
// for [VCPU.Run], where it is the answer to a kick.
//
// # Concurrency
//
// Methods may be called from several goroutines at once, as far as the kernel
// allows: calls on one vCPU wait in the kernel for its KVM_RUN to end, except
// [VCPU.SetImmediateExit] and [VCPU.Kick]. [VCPU.Run] and the methods that
// decode an exit belong to the thread that runs the vCPU. Close must be the
// last call on a value.
//
// # What comes from gokvm, and what does not
//
// From github.com/bobuhiro11/gokvm/kvm: the builders of ioctl numbers, the
// capability type and its constants, the exit reasons up to 17, and four structs
// that are not saved: UserspaceMemoryRegion, RunData, MPState, Translation. Its
// functions that pass no pointer: KVM_GET_API_VERSION, KVM_CREATE_VM,
// KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU,
// KVM_CREATE_IRQCHIP, KVM_SET_TSS_ADDR, KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ.
//
// Not from gokvm:
//
//   - Calls that pass a pointer. Its Ioctl takes the address as an uintptr through
//     an ordinary Go function, so that neither the garbage collector nor a growing
//     stack knows about it until the kernel has it.
//   - KVM_RUN: it turns EINTR and EAGAIN into success, so that a kicked vCPU cannot be
//     told from one that exited.
//   - KVM_GET_DIRTY_LOG: it turns ENOENT into success, and nothing checks the
//     bitmap's length. KVM_SET_IDENTITY_MAP_ADDR: it passes four of the eight
//     bytes that the kernel reads.
//   - KVM_SET_GSI_ROUTING: its entries are 24 bytes, the kernel's are 48.
//     KVM_SET_MSRS: the count of MSRs that landed is lost. KVM_CREATE_PIT2: no flags.
//   - The structs of a saved machine: their fields' names are part of the format
//     and must not change with a library. A test compares the layout of all
//     structs with the kernel's headers.
//   - What it lacks: KVM_CLEAR_DIRTY_LOG, KVM_ENABLE_CAP, the dirty ring, KVM_IRQFD,
//     KVM_IOEVENTFD, XSAVE and XSAVE2, nested state, device attributes (TSC
//     offset, XCOMP), KVM_KVMCLOCK_CTRL, exit reasons above 17.
package kvm
