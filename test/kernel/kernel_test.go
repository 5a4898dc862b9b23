package kernel

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
)

// TestPrograms: the first processes make no system call, so they also run as processes
// of the host, whose memory has the report. Their second pass verifies what the first
// wrote.
func TestPrograms(t *testing.T) {
	for _, tt := range []struct {
		name  string
		pages uint64 // of the working set
	}{{"memhog", 256}, {"diskread", 64}} {
		t.Run(tt.name, func(t *testing.T) {
			testenv.NeedTools(t, "gcc", "ld")
			program, err := Program(tt.name, 64)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), tt.name)
			if err := os.WriteFile(path, program, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(path, "idle=10", "size=1M")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			})
			at := reportAddress(t, path)
			mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = mem.Close() }()
			page := make([]byte, mempage.Size)
			for deadline := time.Now().Add(testenv.Patience); ; time.Sleep(time.Millisecond) {
				_, err := mem.ReadAt(page, at) // fails until the process has executed the program
				r, ok := ParseReport(page)
				if err != nil || !ok || r.Passes < 2 {
					if time.Now().After(deadline) {
						t.Fatalf("no second pass within %v: %+v, %v", testenv.Patience, r, err)
					}
					continue
				}
				written := r.Passes * tt.pages
				if tt.name == "diskread" {
					written = 0
				}
				if r.Pages != tt.pages || r.Bad != 0 || r.Verified < tt.pages || r.Written < written {
					t.Errorf("report %+v", r)
				}
				break
			}
		})
	}
}

// reportAddress finds the page with the counters in .bss: it is the only page there, or
// the last after the working set.
func reportAddress(t *testing.T, path string) int64 {
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	bss := f.Section(".bss")
	if bss == nil {
		t.Fatal("no .bss")
	}
	if bss.Size == mempage.Size {
		return int64(bss.Addr)
	}
	return int64(bss.Addr + bss.Size - mempage.Size)
}

// TestProgramsAreAlone: the programs have no system call, and their files do not have
// the magic number, which would be a second report in the page cache.
func TestProgramsAreAlone(t *testing.T) {
	testenv.NeedTools(t, "gcc", "ld", "objdump")
	for _, name := range []string{"memhog", "diskread"} {
		program, err := Program(name, 2)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, program, 0o755); err != nil {
			t.Fatal(err)
		}
		code, err := exec.Command("objdump", "-d", "-j", ".text", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{"syscall", "sysenter", "int "} {
			if strings.Contains(string(code), "\t"+word) {
				t.Errorf("%s has %s", name, word)
			}
		}
		if bytes.Contains(program, []byte("govmmHOG")) {
			t.Errorf("%s holds the magic number", name)
		}
	}
}

// TestInitramfs: cpio reads what Initramfs writes.
func TestInitramfs(t *testing.T) {
	testenv.NeedTools(t, "cpio")
	image := Initramfs(File{Name: "init", Data: []byte("one")}, File{Name: "etc", Mode: directory | 0o755}, File{Name: "etc/four", Data: []byte("four"), Mode: regular | 0o644})
	cmd := exec.Command("cpio", "-tv", "--quiet")
	cmd.Stdin = bytes.NewReader(image)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		names = append(names, f[0]+" "+f[len(f)-1])
	}
	want := "drwxr-xr-x dev,crw------- dev/console,-rwxr-xr-x init,drwxr-xr-x etc,-rw-r--r-- etc/four"
	if got := strings.Join(names, ","); got != want {
		t.Errorf("cpio lists\n%s, not\n%s", got, want)
	}
}

func TestExt2(t *testing.T) {
	testenv.NeedTools(t, "mke2fs", "debugfs")
	path := filepath.Join(t.TempDir(), "root.img")
	if err := Ext2(path, 4<<20, []byte("the program")); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("debugfs", "-R", "cat /init", path).Output()
	if err != nil || string(out) != "the program" {
		t.Errorf("/init holds %q, %v", out, err)
	}
}

func TestReport(t *testing.T) {
	memory := make([]byte, 4*mempage.Size)
	if at := FindReport(memory); at != -1 {
		t.Errorf("a report at %#x of nothing", at)
	}
	copy(memory[2*mempage.Size:], "govmmHOGreport-1\x01")
	memory[2*mempage.Size+24] = 7
	if at := FindReport(memory); at != 2*mempage.Size {
		t.Errorf("report at %#x", at)
	}
	if r, ok := ParseReport(memory[2*mempage.Size:]); !ok || r != (Report{Pages: 7}) {
		t.Errorf("report %+v, %v", r, ok)
	}
}
