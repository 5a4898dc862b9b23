package machine

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// spareFiles are open files that a machine leaves to the rest of its process: clients of the
// API, the connections of a migration, samples of disks. What a guest itself can open, the
// connections of its socket device, is bounded by that device.
const spareFiles = 64

// checkFiles reports that the limit of open files is too low for this process. It is called
// when a machine has opened what it needs. The soft limit is the hard one: Go raises it.
func checkFiles() error {
	lowest, err := unix.Eventfd(0, unix.EFD_CLOEXEC) // the lowest that is free: nearly all below are open
	if err == nil {
		err = unix.Close(lowest)
	}
	var limit unix.Rlimit
	if err == nil {
		err = unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &limit) // this way, as a sandbox allows it
	}
	if err != nil {
		return tooFewFiles(err)
	}
	if need := uint64(lowest) + spareFiles; need > limit.Cur {
		return fmt.Errorf("this VM needs about %d open files, %d of them for its API and migrations, and its process may have %d: raise the limit (ulimit -n, LimitNOFILE= of a systemd unit)",
			need, spareFiles, limit.Cur)
	}
	return nil
}

// tooFewFiles says what to do if err is the limit of open files.
func tooFewFiles(err error) error {
	if errors.Is(err, unix.EMFILE) {
		return fmt.Errorf("%w: the VM's process needs more open files: raise the limit (ulimit -n, LimitNOFILE= of a systemd unit)", err)
	}
	return err
}
