package test

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/test/kernel"
	"golang.org/x/sys/unix"
)

// bootPatience bounds the wait for a Linux guest: where ring 0 is emulated its
// kernel takes a minute or two to its first process. So these tests run two at a
// time (t.Parallel), which go test does after all others: but for those that
// measure, as TestLinuxPing does.
const bootPatience = 20 * time.Minute

// linux says how a guest with the test kernel is started.
type linux struct {
	variant kernel.Variant
	cpus    int
	memory  string
	program string   // memhog or diskread
	words   string   // for the program
	root    bool     // the program is on a root disk, not in an initial RAM disk
	pages   int      // of diskread's file
	kernel  string   // more of the kernel's command line
	args    []string // more for govmm run
}

// files are what a guest is started from.
type files struct{ kernel, initrd, root string }

// prepare makes the files.
func (l *linux) prepare(t testing.TB) (f files) {
	t.Helper()
	var err error
	if f.kernel, err = kernel.Build(l.variant); err != nil {
		t.Fatal(err)
	}
	program, err := kernel.Program(l.program, l.pages)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if l.root {
		f.root = filepath.Join(dir, "root.img")
		size := int64(len(program)) + 8*mib
		if err := kernel.Ext2(f.root, size&^(mib-1), program); err != nil {
			t.Fatal(err)
		}
		return f
	}
	f.initrd = filepath.Join(dir, "initrd.img")
	image := kernel.Initramfs(kernel.File{Name: "init", Data: program})
	if err := os.WriteFile(f.initrd, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// run starts the guest on a host.
func (l *linux) run(h *host, name string, f files) *proc {
	h.t.Helper()
	args := []string{"run", name, "--cpus", fmt.Sprint(l.cpus), "--memory", l.memory, "--memory-backing", "memfd", "--kernel", f.kernel}
	if f.root != "" {
		args = append(args, "--disk", "path="+f.root+",readonly")
	} else {
		args = append(args, "--initrd", f.initrd)
	}
	return h.start(append(append(args, "--cmdline", l.cmdline(f)), l.args...)...)
}

// cmdline is the kernel's command line.
func (l *linux) cmdline(f files) string {
	s := "console=ttyS0 " + kernel.Cmdline
	if f.root != "" {
		s += " root=/dev/vda rootfstype=ext2 ro init=/init"
	}
	return strings.TrimSpace(s+" "+l.kernel) + " -- " + l.words
}

// report reads the counters of the guest's first process out of the memory of
// the process that runs it now; ok is false while there are none. Where they
// were they still are: all memory is looked through only until they are found.
func (p *proc) report() (r kernel.Report, ok bool) {
	p.t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmp.Or(p.memoryOf, p.cmd.Process.Pid)))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, link := range links {
		if target, err := os.Readlink(link); err != nil || !strings.HasPrefix(target, "/memfd:") {
			continue
		}
		f, err := os.Open(link)
		if err != nil {
			continue // closed meanwhile
		}
		if r, ok = reportAt(f, p.reportAt); !ok {
			r, p.reportAt, ok = findReport(f)
		}
		f.Close()
		if ok {
			return r, true
		}
	}
	return r, false
}

// reportAt reads the counters at an offset, if they are there.
func reportAt(f *os.File, at int64) (kernel.Report, bool) {
	page := make([]byte, mempage.Size)
	if n, err := f.ReadAt(page, at); err != nil || n < len(page) {
		return kernel.Report{}, false
	}
	return kernel.ParseReport(page)
}

// findReport looks through what is populated of guest memory.
func findReport(f *os.File) (r kernel.Report, where int64, ok bool) {
	buf := make([]byte, 4*mib)
	for at := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err != nil {
			return r, 0, false // no more
		}
		at = data &^ (mempage.Size - 1)
		n, _ := f.ReadAt(buf, at)
		if n == 0 {
			return r, 0, false
		}
		if i := kernel.FindReport(buf[:n]); i >= 0 {
			r, ok = kernel.ParseReport(buf[i:n])
			return r, at + int64(i), ok
		}
		at += int64(n)
	}
}

// awaitReport waits until the counters say what is wanted. None ever counts a
// bad page.
func (p *proc) awaitReport(what string, within time.Duration, ok func(kernel.Report) bool) kernel.Report {
	p.t.Helper()
	var last kernel.Report
	pause := 200 * time.Millisecond
	for deadline := time.Now().Add(within); ; {
		select {
		case <-p.done:
			p.t.Fatalf("the guest has ended before %s", what)
		case <-time.After(pause):
		}
		began := time.Now()
		r, found := p.report()
		// On a slow machine the guest gets most of the time all the same.
		pause = max(pause, 10*time.Since(began))
		if found {
			last = r
			if r.Bad != 0 {
				p.t.Fatalf("page %d, word %d of the working set is %#x and not %#x: %+v", r.BadPage, r.BadWord, r.BadFound, r.BadWant, r)
			}
			if ok(r) {
				return r
			}
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("no %s within %v; last report %+v", what, within, last)
		}
	}
}

// awaitBoot waits for the first process and its first check of its memory.
func (p *proc) awaitBoot() kernel.Report {
	p.t.Helper()
	r := p.awaitReport("first process", bootPatience, func(r kernel.Report) bool { return r.Verified > 0 })
	for _, s := range p.out.snapshot() {
		for _, bad := range complaints {
			if strings.Contains(s, bad) {
				p.t.Errorf("the guest's kernel complains: %s", s)
			}
		}
	}
	return r
}

// goesOn waits until the process has checked its whole working set anew.
func (p *proc) goesOn(since kernel.Report) kernel.Report {
	p.t.Helper()
	return p.awaitReport("pass after "+fmt.Sprint(since.Passes), bootPatience, func(r kernel.Report) bool {
		return r.Passes >= since.Passes+2 && r.Verified >= since.Verified+since.Pages
	})
}

// complaints are what no kernel log should have.
var complaints = []string{"BUG:", "Oops", "general protection", "Bad page", "soft lockup", "hung task", "I/O error", "Call Trace"}

// quietly checks the kernel's log for complaints since line from.
func (p *proc) quietly(from int) {
	p.t.Helper()
	for _, s := range p.out.snapshot()[from:] {
		for _, bad := range complaints {
			if strings.Contains(s, bad) {
				p.t.Errorf("the guest's kernel complains: %s", s)
			}
		}
	}
}

// sysrq has the guest's kernel do something by itself.
func (p *proc) sysrq(key string) {
	p.t.Helper()
	if _, err := p.in.Write([]byte(kernel.Sysrq + key)); err != nil {
		p.t.Fatal(err)
	}
}

// needRoot skips the test where taps, bridges and network namespaces cannot be
// made.
func needRoot(t testing.TB) {
	t.Helper()
	testenv.NeedRoot(t, "taps, bridges, network namespaces")
}

// content makes a file of so many bytes that are not zero.
func content(t testing.TB, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, bytes.Repeat([]byte("govmm-disk-block"), size/16), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
