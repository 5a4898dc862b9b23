package loader

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/govmm/govmm/vmm/loader/elftest"
	"github.com/govmm/govmm/vmm/memory"
)

func newMemory(t testing.TB, size uint64) *memory.Memory {
	t.Helper()
	m, err := memory.New(size, memory.Anonymous)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func read(t testing.TB, m *memory.Memory, gpa, n uint64) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := m.ReadAt(p, gpa); err != nil {
		t.Fatal(err)
	}
	return p
}

// cstring reads a string that ends with a zero byte.
func cstring(t testing.TB, m *memory.Memory, gpa uint64) string {
	t.Helper()
	b := read(t, m, gpa, MaxCmdline+1)
	n := bytes.IndexByte(b, 0)
	if n < 0 {
		t.Fatalf("no string at %#x", gpa)
	}
	return string(b[:n])
}

// A kernel is loaded, and hvm_start_info leads to all options.
func TestLoadPVH(t *testing.T) {
	const gib = 1 << 30
	code := []byte("\xf4 code of the kernel")
	for _, size := range []uint64{2 << 20, 512 << 20, 3 * gib, 5 * gib} {
		m := newMemory(t, size)
		initrd := bytes.Repeat([]byte("initrd"), 2000)
		entry, err := loadPVH(m, elftest.Build(elftest.Kernel{Code: code, BSS: 3 << 12}), Options{
			Cmdline: "fill=16M tick=1",
			Modules: []Module{{Data: initrd, Cmdline: "first"}, {Data: []byte("second module")}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if entry != (Entry{RIP: 1 << 20, RBX: startInfoGPA}) {
			t.Errorf("entry %+v", entry)
		}
		if got := read(t, m, 1<<20, uint64(len(code))); !bytes.Equal(got, code) {
			t.Errorf("code %q", got)
		}
		le := binary.LittleEndian
		info := read(t, m, entry.RBX, startInfoSize)
		if le.Uint32(info) != 0x336ec578 || le.Uint32(info[4:]) != 1 || le.Uint32(info[8:]) != 0 || le.Uint64(info[32:]) != 0 {
			t.Errorf("start info % x", info)
		}
		if got := cstring(t, m, le.Uint64(info[24:])); got != "fill=16M tick=1" {
			t.Errorf("command line %q", got)
		}
		if n := le.Uint32(info[12:]); n != 2 {
			t.Fatalf("%d modules", n)
		}
		modules := read(t, m, le.Uint64(info[16:]), 2*32)
		if got := read(t, m, le.Uint64(modules), le.Uint64(modules[8:])); !bytes.Equal(got, initrd) {
			t.Error("the first module differs")
		}
		if got := cstring(t, m, le.Uint64(modules[16:])); got != "first" {
			t.Errorf("the first module's command line is %q", got)
		}
		if got := read(t, m, le.Uint64(modules[32:]), le.Uint64(modules[40:])); string(got) != "second module" {
			t.Errorf("the second module is %q", got)
		}
		regions := memoryMap(size, nil)
		if n := le.Uint32(info[48:]); int(n) != len(regions) {
			t.Fatalf("%d memory map entries, want %d", n, len(regions))
		}
		memmap := read(t, m, le.Uint64(info[40:]), uint64(len(regions))*24)
		for i, r := range regions {
			e := memmap[i*24:]
			if le.Uint64(e) != r.GPA || le.Uint64(e[8:]) != r.Size || le.Uint32(e[16:]) != uint32(r.Type) || le.Uint32(e[20:]) != 0 {
				t.Errorf("memory map entry %d: % x, want %+v", i, e[:24], r)
			}
		}
		// The BSS is not populated.
		if n, err := m.PopulatedPages(); err != nil || (size < 1<<21 && n > 16) {
			t.Errorf("%d pages populated, %v", n, err)
		}
	}
}

func TestMemoryMap(t *testing.T) {
	const gib = 1 << 30
	for _, tt := range []struct {
		size uint64
		ram  []Region
	}{
		{1 << 20, []Region{{0, 0x9fc00, RAM}}},
		{64 << 20, []Region{{0, 0x9fc00, RAM}, {1 << 20, 63 << 20, RAM}}},
		{3 * gib, []Region{{0, 0x9fc00, RAM}, {1 << 20, 3*gib - 1<<20, RAM}}},
		{4 * gib, []Region{{0, 0x9fc00, RAM}, {1 << 20, 3*gib - 1<<20, RAM}, {4 * gib, gib, RAM}}},
	} {
		var ram []Region
		end := uint64(0)
		for _, r := range memoryMap(tt.size, nil) {
			if r.GPA < end || r.Size == 0 {
				t.Errorf("size %#x: %+v starts before %#x or is empty", tt.size, r, end)
			}
			end = r.GPA + r.Size
			if r.Type == RAM {
				ram = append(ram, r)
			}
		}
		if len(ram) != len(tt.ram) {
			t.Fatalf("size %#x: RAM %+v, want %+v", tt.size, ram, tt.ram)
		}
		for i := range ram {
			if ram[i] != tt.ram[i] {
				t.Errorf("size %#x: RAM %+v, want %+v", tt.size, ram[i], tt.ram[i])
			}
		}
	}
}

// The loader moves its own data away from the kernel's segments, or refuses the
// kernel.
func TestLoadPVHPlaces(t *testing.T) {
	code := bytes.Repeat([]byte{0xf4}, 64)
	for _, tt := range []struct {
		name   string
		kernel elftest.Kernel
		size   uint64
		opt    Options
		want   string // in the error
		rbx    uint64
	}{
		{name: "usual", kernel: elftest.Kernel{}, rbx: startInfoGPA},
		{name: "on start info", kernel: elftest.Kernel{Load: 0x5000, BSS: 0x2000}, rbx: 0x1000},
		{name: "all low pages", kernel: elftest.Kernel{Load: 0x1000, BSS: 0x1ffc0}, rbx: 0x21000},
		{name: "on command line", kernel: elftest.Kernel{Load: 0x20000}, rbx: startInfoGPA},
		{name: "all of low memory", kernel: elftest.Kernel{Load: 0x500, BSS: ebda - 0x500 - 64}, rbx: 0x100000},
		{name: "all but pages", kernel: elftest.Kernel{Load: 0x100000, BSS: 15<<20 - 64}, rbx: startInfoGPA},
		{name: "BIOS data area", kernel: elftest.Kernel{Load: 0x4c0}, want: "BIOS data area"},
		{name: "EBDA", kernel: elftest.Kernel{Load: ebda - 32}, want: "BIOS area"},
		{name: "end of RAM", kernel: elftest.Kernel{BSS: 15<<20 - 63}, want: "RAM"},
		{name: "beyond RAM", kernel: elftest.Kernel{Load: 1 << 30}, want: "RAM"},
		{name: "wraps", kernel: elftest.Kernel{Load: ^uint64(0) - 0xfff}, want: "RAM"},
		{name: "huge bss", kernel: elftest.Kernel{BSS: 1 << 63}, want: "RAM"},
		{name: "above 4 GiB", kernel: elftest.Kernel{Load: 4 << 30, Entry: 0x100000}, size: 4 << 30, want: "outside of all segments"},
		{name: "entry elsewhere", kernel: elftest.Kernel{Entry: 0x200000}, want: "outside of all segments"},
		{name: "long command line", opt: Options{Cmdline: strings.Repeat("x", 2048)}, want: "at most 2047"},
		{name: "longest command line", opt: Options{Cmdline: strings.Repeat("x", 2047)}, rbx: startInfoGPA},
		{name: "zero in command line", opt: Options{Cmdline: "a\x00b"}, want: "zero byte at 1"},
		{name: "module too large", opt: Options{Modules: []Module{{Data: make([]byte, 16<<20)}}}, want: "no room for module 0"},
		{name: "module around kernel", kernel: elftest.Kernel{Load: 15 << 20, BSS: 1<<20 - 64}, rbx: startInfoGPA,
			opt: Options{Modules: []Module{{Data: make([]byte, 14<<20)}}}},
		{name: "too many modules", opt: Options{Modules: make([]Module, 65)}, want: "at most 64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.size == 0 {
				tt.size = 16 << 20
			}
			m := newMemory(t, tt.size)
			tt.kernel.Code = code
			file := elftest.Build(tt.kernel)
			entry, err := loadPVH(m, file, tt.opt)
			if tt.want != "" {
				checkError(t, err, tt.want)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if entry.RBX != tt.rbx {
				t.Errorf("hvm_start_info at %#x, want %#x", entry.RBX, tt.rbx)
			}
			load := tt.kernel.Load
			if load == 0 {
				load = 1 << 20
			}
			if got := read(t, m, load, 64); !bytes.Equal(got, code) {
				t.Errorf("code % x", got)
			}
			cmdline := binary.LittleEndian.Uint64(read(t, m, entry.RBX, 56)[24:])
			if got := cstring(t, m, cmdline); got != tt.opt.Cmdline {
				t.Errorf("command line %q", got)
			}
		})
	}
}

// checkError fails unless err is one line with want in it.
func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %v, want one line with %q", err, want)
	}
}
