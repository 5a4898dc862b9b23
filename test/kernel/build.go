package kernel

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/govmm/govmm/mempage"
)

// Variant is a configuration of the test kernel.
type Variant string

// The variants.
const (
	NoACPI Variant = "noacpi" // CPUs from the MP table, PCI by ports
	ACPI   Variant = "acpi"   // and tables, power button, ECAM, pvpanic, CMOS clock
	Poison Variant = "poison" // as NoACPI; supports page_poison=1 and init_on_free=1
	Disk   Variant = "disk"   // as NoACPI, with ext4, and INT 0x80 is a system call everywhere
)

// Cmdline is what the test kernel needs on its command line where ring 0 is
// emulated, and works with elsewhere. Console and first process are added by the
// test. Registering 256 old pseudo terminals, which nothing uses, takes two minutes
// there; and RCU takes a vCPU that is emulated slowly for one that hangs.
const Cmdline = "pty.legacy_count=0 rcupdate.rcu_cpu_stall_suppress_at_boot=1 rcupdate.rcu_cpu_stall_suppress=1 " +
	"mitigations=off nokaslr nopti noxsave nosmep nosmap lpj=5000000 tsc=reliable no_timer_check " +
	"clearcpuid=cx16,xsave,umip,fsgsbase,invpcid,pcid,erms,fsrm,smep,smap,rdrand,rdseed,popcnt,abm,bmi1,bmi2,movbe,rdpid," +
	"rdtscp,sse4_1,sse4_2,ssse3,pni,avx,avx2,avx512f,fma,f16c,adx,aes,pclmulqdq,sha_ni,clwb,clflushopt,clzero,gfni,vaes," +
	"vpclmulqdq,xsaves,xsaveopt,xsavec panic=-1"

// Sysrq makes the kernel take the next byte on its serial line, or on hvc0, as
// a magic SysRq key: o powers off, b restarts, c crashes. On the serial line it
// listens once the first process was started with /dev/console open.
const Sysrq = "\x0f"

// here is the directory of this package's sources.
func here() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if dir := filepath.Dir(file); ok && filepath.IsAbs(dir) {
		return dir, nil
	}
	// Built with -trimpath: tests run in their package's directory.
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "test/kernel/build.sh")); err == nil {
			return filepath.Join(dir, "test/kernel"), nil
		}
		dir = filepath.Dir(dir)
	}
	return "", fmt.Errorf("find test/kernel/build.sh: %w", os.ErrNotExist)
}

// Build returns the path of a variant's vmlinux, built now if it is not in the
// cache yet, which takes some minutes. "bzImage" lies beside it.
func Build(v Variant) (vmlinux string, err error) {
	dir, err := here()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(filepath.Join(dir, "build.sh"), string(v))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build the test kernel, variant %s: %w", v, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Program compiles one of the first processes, "memhog", "diskread" or "diskwriter", and
// returns its content. diskread carries pages of pattern; the others ignore them.
func Program(name string, pages int) ([]byte, error) {
	dir, err := here()
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "govmm-init-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if err := os.WriteFile(filepath.Join(tmp, "pattern.bin"), Pattern(pages), 0o600); err != nil {
		return nil, err
	}
	out := filepath.Join(tmp, name)
	cmd := exec.Command("gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-fno-pic", "-no-pie", "-static", "-nostdlib",
		"-ffreestanding", "-fno-stack-protector", "-fcf-protection=none", "-mgeneral-regs-only",
		"-Wl,-z,noexecstack,--build-id=none,-s", "-I", filepath.Join(dir, "init"), "-o", out, filepath.Join(dir, "init", name+".c"))
	cmd.Dir = tmp
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile %s.c: %w\n%s", name, err, text)
	}
	return os.ReadFile(out)
}

// Pattern returns pages of what diskread expects in its file: pass 0 of
// pattern() in init/report.h.
func Pattern(pages int) []byte { return pattern(0, pages, 0) }

// pattern returns pages from one on, as they are after a pass.
func pattern(page, pages int, pass uint64) []byte {
	b := make([]byte, 0, pages*mempage.Size)
	for i := range uint64(pages) * mempage.Size / 8 {
		x := (uint64(page)*mempage.Size/8+i+1)*0x9e3779b97f4a7c15 + pass*0xd1342543de82ef95
		x ^= x >> 32
		x *= 0xd6e8feb86659fd93
		b = binary.LittleEndian.AppendUint64(b, x^x>>32)
	}
	return b
}

// Ext2 writes an ext2 image of the size in bytes to path, with the program as
// /init; mke2fs makes it (package e2fsprogs).
func Ext2(path string, size int64, init []byte) error {
	return makeRoot(path, "ext2", size, init)
}

// Ext4 is Ext2 for diskwriter: ext4, with its directory.
func Ext4(path string, size int64, init []byte) error {
	return makeRoot(path, "ext4", size, init, writerFiles)
}

func makeRoot(path, kind string, size int64, init []byte, more ...string) error {
	root, err := os.MkdirTemp("", "govmm-root-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(root) }()
	for _, d := range append(more, "dev", "proc", "sys") {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, "init"), init, 0o755); err != nil {
		return err
	}
	out, err := exec.Command("mke2fs", "-q", "-F", "-t", kind, "-b", "4096", "-d", root, path, fmt.Sprintf("%dk", size>>10)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mke2fs %s: %w: %s", path, err, out)
	}
	return nil
}
