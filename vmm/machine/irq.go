package machine

import (
	"sync/atomic"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio/transport"
)

// interrupts sends the messages of PCI functions to the guest, and takes the guest's
// notifications out of KVM, with an ioeventfd each. There are no irqfds: a message that
// KVM_SIGNAL_MSI has sent is in the local APIC when the call returns, while one by an
// irqfd may still be on its way, and a stop would have to take each irqfd off, one grace
// period of the kernel after the other.
type interrupts struct {
	vm   *kvm.VM
	over atomic.Bool // the vCPUs have ended: nothing need be deassigned any more
}

var (
	_ pci.Interrupts          = (*interrupts)(nil)
	_ transport.Notifications = (*interrupts)(nil)
)

// SignalMSI sends a message.
func (n *interrupts) SignalMSI(address uint64, data uint32) error {
	_, err := n.vm.SignalMSI(address, data)
	return err
}

// AssignIOEventFD makes the guest's writes at gpa signal an eventfd.
func (n *interrupts) AssignIOEventFD(gpa uint64, fd int) error {
	return n.vm.IOEventFD(kvm.IOEventFD{Addr: gpa, FD: fd})
}

// DeassignIOEventFD undoes it.
func (n *interrupts) DeassignIOEventFD(gpa uint64, fd int) error {
	if n.over.Load() {
		return nil
	}
	return n.vm.IOEventFD(kvm.IOEventFD{Addr: gpa, FD: fd, Flags: kvm.IOEventFDDeassign})
}
