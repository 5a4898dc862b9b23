package vmm

import (
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/govmm/govmm/vmm/machine"
	"golang.org/x/sys/unix"
)

// Stats is what a VM has used. Reading it stops nothing.
type Stats struct {
	VCPUs    []machine.VCPUStats // of the machine since its last reset; nil while there is none
	CPUTime  time.Duration       // of the whole process, vCPUs included
	Resident uint64              // bytes of the process that are in memory, with what the guest has touched; 0: not known
}

// Stats returns what the VM has used until now.
func (v *VM) Stats() (s Stats) {
	v.lifeMu.Lock()
	m := v.machine
	v.lifeMu.Unlock()
	if m != nil {
		s.VCPUs = m.VCPUs()
	}
	var usage unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &usage) == nil {
		s.CPUTime = time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	if v.statm != nil {
		buf := make([]byte, 128)
		n, _ := v.statm.ReadAt(buf, 0)
		if fields := strings.Fields(string(buf[:n])); len(fields) > 1 { // proc_pid_statm(5)
			pages, _ := strconv.ParseUint(fields[1], 10, 64)
			s.Resident = pages * uint64(os.Getpagesize())
		}
	}
	return s
}
