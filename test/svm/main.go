// Command svm runs a command on a machine with SVM where there is none: Debian's
// kernel with its own kvm_amd in QEMU, which emulates an AMD processor. The
// machine's files are those of the machine that it runs on, so the command
// finds everything under the same path, and /dev/kvm opens. It is ten to thirty times
// slower than a real one, so compile here and run there:
//
//	CGO_ENABLED=0 go build -o /tmp/svm ./test/svm
//	go test -exec /tmp/svm ./kvm
//
// Output and exit status are the command's; status 125 means that the machine itself
// failed. The command sees the files of this machine, but no devices, no processes, no
// network, and nothing below /run. TMPDIR is in the emulated machine's memory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
)

// failed is the exit status when it was not the command that failed.
const failed = 125

func main() {
	if os.Getpid() == 1 { // this program is the machine's first process as well
		guestMain()
		return
	}
	// QEMU must end when this thread ends.
	runtime.LockOSThread()
	var m machine
	flag.StringVar(&m.qemu, "qemu", "qemu-system-x86_64", "QEMU's `program`")
	flag.StringVar(&m.memory, "memory", "3G", "the machine's memory, as `QEMU` takes it")
	flag.IntVar(&m.cpus, "cpus", 2, "the machine's `CPUs`")
	flag.StringVar(&m.threads, "threads", "single", "QEMU's threads: `single` for all CPUs, or multi, one for each, which guests with Linux need")
	flag.StringVar(&m.params, "params", "", "`PARAMETERS` of the machine's kernel and modules: kvm_amd.npt=0 is a KVM that shadows page tables")
	flag.BoolVar(&m.verbose, "v", false, "show the log of the machine's kernel")
	timeout := flag.Duration("timeout", 30*time.Minute, "end the machine after this `time`")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: svm [FLAGS] COMMAND [ARGUMENTS]\nruns COMMAND on an emulated machine with SVM and this machine's files.")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	req, err := newRequest(flag.Args())
	if err != nil {
		fail(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, *timeout, fmt.Errorf("not done within %v", *timeout))
	defer cancel()
	status, err := m.run(ctx, req)
	if err != nil {
		fail(err)
	}
	os.Exit(status)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "svm:", err)
	os.Exit(failed)
}

// request is what the machine is asked to run.
type request struct {
	Argv []string
	Dir  string
	Env  []string
}

// newRequest looks the command up on this machine's PATH.
func newRequest(argv []string) (r request, err error) {
	path, err := exec.LookPath(argv[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return r, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return r, err
	}
	if r.Dir, err = os.Getwd(); err != nil {
		return r, err
	}
	for _, p := range []string{path, r.Dir} {
		for _, own := range ownDirectories {
			if strings.HasPrefix(p+"/", own+"/") {
				return r, fmt.Errorf("%s: the machine has a %s of its own", p, own)
			}
		}
	}
	r.Argv = append([]string{path}, argv[1:]...)
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		if name != "TMPDIR" && name != "XDG_RUNTIME_DIR" {
			r.Env = append(r.Env, e)
		}
	}
	r.Env = append(r.Env, "TMPDIR="+guestTmp, "XDG_RUNTIME_DIR="+guestRuntime, "GOVMM_SVM=1")
	return r, nil
}
