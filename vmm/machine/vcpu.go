package machine

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/sandbox"
	"golang.org/x/sys/unix"
)

// vcpu is one virtual processor and the thread that runs it.
type vcpu struct {
	machine *Machine
	kvm     *kvm.VCPU
	thread  atomic.Int32 // its id, from its start
	exits   exitCounts
	at      atomic.Uint64 // the address of the access to a register that a device is just answering; 0: none is
}

// createVCPUs makes the vCPUs and starts their threads, which wait at the gate.
func (m *Machine) createVCPUs() error {
	for id := range m.spec.CPUs {
		v, err := m.kernel.vm.CreateVCPU(id)
		if err != nil {
			return err
		}
		m.vcpus = append(m.vcpus, &vcpu{machine: m, kvm: v})
		m.gate.vcpus = append(m.gate.vcpus, v)
		if r := m.kernel.rings; r != nil {
			r.vcpus = append(r.vcpus, v)
		}
		// The frequency first: the kernel derives CPUID leaves from it.
		khz, err := v.TSCKHz()
		if err != nil {
			return err
		}
		if m.spec.TSCKHz == 0 {
			m.spec.TSCKHz = khz
		}
		if m.spec.TSCKHz != khz {
			if m.spec.saved {
				n, err := m.kernel.sys.CheckExtension(kvm.CapTSCControl)
				h := host{tscKHz: khz, tscControl: n > 0}
				if err := errors.Join(err, h.fitsTSC(&m.spec)); err != nil {
					return err
				}
			}
			if err := v.SetTSCKHz(m.spec.TSCKHz); err != nil {
				return err
			}
		}
		if err := v.SetCPUID2(cpu.ForVCPU(m.spec.CPUID, id, m.spec.CPUs)); err != nil {
			return err
		}
	}
	m.beginTimer()
	list, err := m.kernel.sys.MSRIndexList()
	if err != nil {
		return err
	}
	// Which of them exist depends on CPUID alone. Each one that does not costs a
	// system call to find out, better now than while the guest stands still.
	present, err := cpu.ReadMSRs(m.vcpus[0].kvm, cpu.SavedMSRs(list))
	if err != nil {
		return err
	}
	for _, p := range present {
		m.kernel.msrs = append(m.kernel.msrs, p.Index)
	}
	m.kernel.features = cpu.FeatureMSRs(m.spec.CPUID, present)
	for _, c := range m.vcpus {
		m.gate.enter()
		m.ending.threads.Go(c.loop)
	}
	go func() {
		m.ending.threads.Wait()
		if m.Exit().Kind == ExitReset {
			close(m.ending.reset)
		}
		close(m.ending.done)
	}()
	return nil
}

// loop is the vCPU's thread, from the machine's making to its end.
func (c *vcpu) loop() {
	// The goroutine ends with the thread locked to it, so Go ends the thread.
	runtime.LockOSThread()
	c.kvm.BindThread()
	c.thread.Store(int32(unix.Gettid()))
	defer c.machine.gate.leave()
	defer c.kvm.UnbindThread()

	pending, kicked, narrow := false, false, false
	for c.machine.gate.admit(c.kvm, pending, kicked) {
		if !narrow { // only now: the machine is made before its process gives up its rights
			if err := sandbox.NarrowVCPU(); err != nil {
				c.crash(err)
				return
			}
			narrow = true
		}
		err := c.kvm.Run()
		pending, kicked = err == nil, errors.Is(err, unix.EINTR)
		switch {
		case err == nil:
			c.handle()
		case kicked:
			c.exits.kicked.Add(1)
		case errors.Is(err, unix.EAGAIN):
			// The vCPU waited in the kernel to be started, and INIT came: go on.
		default:
			c.crash(err)
		}
	}
}

// crash ends the machine.
func (c *vcpu) crash(err error) {
	if fault := (*mempage.Fault)(nil); errors.As(err, &fault) {
		for _, s := range c.machine.mem.Slots() {
			if off := uint64(fault.Addr - s.HVA); off < s.Size {
				err = fmt.Errorf("vCPU %d: %w", c.kvm.ID(), &migrate.PageError{GPA: s.GPA + off&^(mempage.Size-1)})
			}
		}
	}
	c.machine.end(Exit{Kind: ExitCrash, Err: err})
}

// handle does what the guest's exit asks for.
func (c *vcpu) handle() {
	reason := c.kvm.ExitReason()
	c.exits.count(reason)
	switch reason {
	case kvm.ExitIO:
		c.portAccess(c.kvm.IO())
	case kvm.ExitMMIO:
		c.memoryAccess(c.kvm.MMIO())
	case kvm.ExitDirtyRingFull:
		c.ringFull()
	case kvm.ExitShutdown:
		c.machine.end(Exit{Kind: ExitReset, Err: c.tripleFault()})
	case kvm.ExitInternalError:
		c.crash(c.internalError(c.kvm.InternalError()))
	case kvm.ExitFailEntry:
		c.crash(c.failEntry(c.kvm.FailEntry()))
	case kvm.ExitSystemEvent:
		c.systemEvent(c.kvm.SystemEvent())
	case kvm.ExitIntr, kvm.ExitIRQWindowOpen:
		// Nothing to do.
	case kvm.ExitHypercall:
		const enosys = 1000 // KVM_ENOSYS
		c.kvm.SetHypercallResult(^uint64(enosys - 1))
	default:
		c.crash(fmt.Errorf("vCPU %d: KVM_RUN ended with %v, which govmm does not handle%s", c.kvm.ID(), reason, c.where()))
	}
}

// ringFull makes room in the dirty rings. What it collects is kept for the next
// fetch.
func (c *vcpu) ringFull() {
	r := c.machine.kernel.rings
	if r == nil {
		c.crash(fmt.Errorf("vCPU %d: KVM_EXIT_DIRTY_RING_FULL of a machine without rings", c.kvm.ID()))
		return
	}
	if err := r.harvest(); err != nil {
		c.crash(fmt.Errorf("vCPU %d: make room in a full dirty ring: %w", c.kvm.ID(), err))
	}
}

// portAccess is IN, OUT, INS or OUTS; the last two come as several accesses at
// one port.
func (c *vcpu) portAccess(io kvm.IOExit) {
	if io.Data == nil || io.Size == 0 {
		c.crash(fmt.Errorf("vCPU %d: KVM_EXIT_IO of %d times %d bytes at port %#x does not fit kvm_run",
			c.kvm.ID(), io.Count, io.Size, io.Port))
		return
	}
	for p := io.Data; len(p) > 0; p = p[io.Size:] {
		if io.In {
			c.machine.board.ports.Read(uint64(io.Port), p[:io.Size])
		} else {
			c.machine.board.ports.Write(uint64(io.Port), p[:io.Size])
		}
	}
}

// memoryAccess is an access to what is not RAM.
func (c *vcpu) memoryAccess(a kvm.MMIOExit) {
	switch {
	case len(a.Data) == 0:
		c.crash(fmt.Errorf("vCPU %d: KVM_EXIT_MMIO at %#x has no valid length", c.kvm.ID(), a.Addr))
	case a.Write:
		c.at.Store(a.Addr)
		c.machine.board.mmio.Write(a.Addr, a.Data)
		c.at.Store(0)
	default:
		c.at.Store(a.Addr)
		c.machine.board.mmio.Read(a.Addr, a.Data)
		c.at.Store(0)
	}
}

func (c *vcpu) systemEvent(e kvm.SystemEventExit) {
	switch e.Type {
	case kvm.SystemEventShutdown:
		c.machine.end(Exit{Kind: ExitPowerOff})
	case kvm.SystemEventReset:
		c.machine.end(Exit{Kind: ExitReset})
	default:
		c.crash(fmt.Errorf("vCPU %d: KVM_EXIT_SYSTEM_EVENT %d %#x", c.kvm.ID(), e.Type, e.Data))
	}
}
