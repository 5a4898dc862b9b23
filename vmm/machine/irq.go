package machine

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio/transport"
)

// interrupts routes the messages of PCI functions through KVM's routing table, with
// an irqfd each, and the guest's notifications out of KVM, with an ioeventfd each.
type interrupts struct {
	vm   *kvm.VM
	over atomic.Bool // the vCPUs have ended: nothing need be deassigned any more

	routesMu sync.Mutex     // guards all below, and is held over KVM_SET_GSI_ROUTING
	routes   []kvm.IRQRoute // all of the VM's
	free     []uint32       // GSIs that were given back
	next     uint32         // the first GSI that was never given away
	messages map[uint32]int // index in routes of each GSI that leads to a message
}

var (
	_ pci.Interrupts          = (*interrupts)(nil)
	_ transport.Notifications = (*interrupts)(nil)
)

// maxGSIs bounds what a guest's devices can take: KVM_MAX_IRQ_ROUTES, less the
// routes of the PICs and the IOAPIC.
const maxGSIs = 4096 - 64

// errNoGSI: the machine has more interrupt vectors than KVM has routes.
var errNoGSI = errors.New("no GSI is left: the devices have more interrupt vectors than KVM has routes")

// newInterrupts takes over a VM's routing table, which has these routes.
func newInterrupts(vm *kvm.VM, routes []kvm.IRQRoute) *interrupts {
	return &interrupts{vm: vm, routes: routes, next: kvm.IOAPICPins, messages: map[uint32]int{}}
}

// AllocateGSI returns a GSI behind those of the IOAPIC's pins.
func (n *interrupts) AllocateGSI() (uint32, error) {
	n.routesMu.Lock()
	defer n.routesMu.Unlock()
	if last := len(n.free) - 1; last >= 0 {
		gsi := n.free[last]
		n.free = n.free[:last]
		return gsi, nil
	}
	if n.next == maxGSIs {
		return 0, errNoGSI
	}
	n.next++
	return n.next - 1, nil
}

// FreeGSI removes the GSI's route from the table, which reaches the kernel with the
// next change. Nothing raises the GSI any more.
func (n *interrupts) FreeGSI(gsi uint32) {
	n.routesMu.Lock()
	defer n.routesMu.Unlock()
	n.free = append(n.free, gsi)
	at, ok := n.messages[gsi]
	if !ok {
		return
	}
	n.routes = slices.Delete(n.routes, at, at+1)
	delete(n.messages, gsi)
	for other, i := range n.messages {
		if i > at {
			n.messages[other] = i - 1
		}
	}
}

// SetMSIRoutes adds or changes routes, all in one KVM_SET_GSI_ROUTING.
func (n *interrupts) SetMSIRoutes(routes []pci.MSIRoute) error {
	n.routesMu.Lock()
	defer n.routesMu.Unlock()
	for _, r := range routes {
		route := kvm.IRQRoute{GSI: r.GSI, MSI: true, Address: r.Address, Data: r.Data}
		if at, ok := n.messages[r.GSI]; ok {
			n.routes[at] = route
			continue
		}
		n.messages[r.GSI] = len(n.routes)
		n.routes = append(n.routes, route)
	}
	return n.vm.SetGSIRouting(n.routes)
}

// AssignIRQFD makes an eventfd raise the GSI.
func (n *interrupts) AssignIRQFD(gsi uint32, fd int) error { return n.vm.IRQFD(gsi, fd, 0) }

// DeassignIRQFD undoes it; the kernel waits for what was raised.
func (n *interrupts) DeassignIRQFD(gsi uint32, fd int) error {
	if n.over.Load() {
		return nil
	}
	return n.vm.IRQFD(gsi, fd, kvm.IRQFDDeassign)
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
