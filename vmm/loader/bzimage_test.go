package loader

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
	"github.com/govmm/govmm/vmm/loader/elftest"
)

// oldBzImage makes a bzImage of protocol 2.12.
func oldBzImage(payload []byte) []byte {
	return elftest.BzImage([]byte("startup_64"), payload)
}

func unpackAndLoad(mem Memory, kernel []byte, opt Options) (Entry, error) {
	elf, err := Unpack(kernel, mem.Size())
	if err != nil {
		return Entry{}, err
	}
	return Load(mem, elf, opt)
}

// A kernel of protocol 2.12 that unpacks itself gets boot_params, GDT and page tables
// with all options.
func TestLoadOldBzImage(t *testing.T) {
	le := binary.LittleEndian
	const gib = 1 << 30
	file := oldBzImage([]byte("\x89LZO: not unpacked here"))
	initrd := bytes.Repeat([]byte("initrd"), 2000)
	for _, tt := range []struct {
		size, load, initrdEnd uint64
	}{
		{64 << 20, 16 << 20, 64 << 20},
		{16 << 20, 2 << 20, 16 << 20}, // no room at its preferred address
		{3 * gib, 16 << 20, 2 * gib},  // no initrd above initrd_addr_max
	} {
		m := newMemory(t, tt.size)
		e, err := Load(m, file, Options{
			Cmdline: "console=ttyS0", Modules: []Module{{Data: initrd}}, RSDP: 0xe0000,
			Reserved: []Region{{0xe0000000, 1 << 28, Reserved}},
		})
		if err != nil {
			t.Fatal(err)
		}
		want := Entry{Mode: Long64, RIP: tt.load + 0x200, RSI: bootParamsGPA, CR3: pageTablesGPA, GDT: gdtGPA, GDTLimit: 31}
		if e != want {
			t.Errorf("entry %+v, not %+v", e, want)
		}
		if got := read(t, m, e.RIP, 10); string(got) != "startup_64" {
			t.Errorf("at the entry: %q", got)
		}
		p := read(t, m, e.RSI, 4096)
		if string(p[0x202:0x206]) != "HdrS" || p[0x210] != 0xff || le.Uint64(p[0x70:]) != 0xe0000 {
			t.Errorf("header % x, RSDP %#x", p[0x1f1:0x264], le.Uint64(p[0x70:]))
		}
		if got := cstring(t, m, uint64(le.Uint32(p[0x228:]))); got != "console=ttyS0" {
			t.Errorf("command line %q", got)
		}
		at, n := uint64(le.Uint32(p[0x218:])), uint64(le.Uint32(p[0x21c:]))
		if at%4096 != 0 || roundUp(at+n, 4096) != tt.initrdEnd || !bytes.Equal(read(t, m, at, n), initrd) {
			t.Errorf("initrd [%#x,%#x), to end at %#x", at, at+n, tt.initrdEnd)
		}
		regions := memoryMap(tt.size, nil)
		if int(p[0x1e8]) != len(regions)+1 {
			t.Errorf("%d regions in e820", p[0x1e8])
		}
		for i, last := 0, uint64(0); i < int(p[0x1e8]); i++ {
			r := p[0x2d0+20*i:]
			if gpa := le.Uint64(r); gpa < last {
				t.Errorf("region at %#x after %#x", gpa, last)
			}
			last = le.Uint64(r) + le.Uint64(r[8:])
		}
		if bytes.Contains(p[0x264:0x2d0], []byte{1}) {
			t.Error("something behind the setup header's end was copied")
		}
		checkIdentity(t, e.CR3, func(gpa uint64) uint64 { return le.Uint64(read(t, m, gpa, 8)) })
		gdt := read(t, m, e.GDT, uint64(e.GDTLimit)+1)
		if le.Uint64(gdt[0x10:]) != 0x00af9b000000ffff || le.Uint64(gdt[0x18:]) != 0x00cf93000000ffff {
			t.Errorf("GDT % x", gdt)
		}
	}
}

// checkIdentity walks the page tables.
func checkIdentity(t *testing.T, cr3 uint64, load func(gpa uint64) uint64) {
	for _, gva := range []uint64{0, 0x7000, 16<<20 + 0x200, 1<<30 - 1, 1 << 30, 0xffffffff} {
		table := cr3
		for _, shift := range []uint{39, 30} {
			e := load(table + gva>>shift&511*8)
			if e&(1<<7) != 0 || e&3 != 3 {
				t.Fatalf("%#x: entry %#x at level %d", gva, e, shift)
			}
			table = e &^ 0xfff
		}
		e := load(table + gva>>21&511*8)
		if gpa := e&^0x1fffff | gva&0x1fffff; e&0x83 != 0x83 || gpa != gva {
			t.Errorf("%#x is mapped to %#x (%#x)", gva, gpa, e)
		}
	}
}

// An initrd that does not fit below 3 GiB is above 4 GiB if the kernel supports that.
func TestInitrdAbove4G(t *testing.T) {
	for _, tt := range []struct {
		flags byte
		ok    bool
	}{{xlfKernel64 | xlfAbove4G, true}, {xlfKernel64, false}} {
		file := oldBzImage(nil)
		file[hdrXLoadFlags] = tt.flags
		binary.LittleEndian.PutUint32(file[hdrInitrdAddrMax:], 0x1fffff)
		m := newMemory(t, 4<<30)
		e, err := Load(m, file, Options{Modules: []Module{{Data: make([]byte, 4<<20)}}})
		if !tt.ok {
			checkError(t, err, "no room for the initrd")
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		p := read(t, m, e.RSI, 4096)
		if low, high := binary.LittleEndian.Uint32(p[0x218:]), binary.LittleEndian.Uint32(p[0xc0:]); high != 1 || low != 0x3fc00000 {
			t.Errorf("initrd at %#x:%08x", high, low)
		}
	}
}

// A payload with a PVH entry is unpacked only by Unpack. Load does not read the
// payload.
func TestUnpackOnHost(t *testing.T) {
	elf := elftest.Build(elftest.Kernel{Code: []byte("\xf4 code of the kernel"), Load: 16 << 20})
	noNote := bytes.Clone(elf)
	noNote[note+8] = 1
	pvh := Entry{RIP: 16 << 20, RBX: startInfoGPA}
	for how := range compressors {
		file := oldBzImage(pack(t, how, append(bytes.Clone(elf), "relocations"...)))
		if e, err := unpackAndLoad(newMemory(t, 64<<20), file, Options{}); err != nil || e != pvh {
			t.Errorf("%s: %+v, %v", how, e, err)
		}
		if e, err := Load(newMemory(t, 64<<20), file, Options{}); err != nil || e.Mode != Long64 {
			t.Errorf("%s, not to be unpacked: %+v, %v", how, e, err)
		}
	}
	for what, payload := range map[string][]byte{"no PVH note": noNote, "no ELF": []byte("text")} {
		if e, err := unpackAndLoad(newMemory(t, 64<<20), oldBzImage(pack(t, "gzip", payload)), Options{}); err != nil || e.Mode != Long64 {
			t.Errorf("%s: %+v, %v", what, e, err)
		}
	}
	damaged := oldBzImage(pack(t, "gzip", elf))
	damaged[elftest.BzImagePayload+50] ^= 0xff
	_, err := unpackAndLoad(newMemory(t, 64<<20), damaged, Options{})
	checkError(t, err, "kernel: bzImage: unpack")
	if e, err := Load(newMemory(t, 64<<20), damaged, Options{}); err != nil || e.Mode != Long64 {
		t.Errorf("a damaged payload, not to be unpacked: %+v, %v", e, err)
	}
}

// The kernel of Debian's cloud images, unpacked on the host and by itself.
func TestDebianKernel(t *testing.T) {
	testenv.NotShort(t, "fetches Debian's kernel")
	path, err := kernel.DebianKernel()
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := newMemory(t, 512<<20)
	e, err := unpackAndLoad(m, file, Options{Cmdline: "console=ttyS0", Modules: []Module{{Data: []byte("initrd")}}})
	if err != nil {
		t.Fatal(err)
	}
	if e.Mode != PVH32 || e.RIP < 16<<20 || e.RIP >= 64<<20 {
		t.Errorf("unpacked here: %+v", e)
	}
	if zero := make([]byte, 16); bytes.Equal(read(t, m, e.RIP, 16), zero) {
		t.Error("nothing at the entry")
	}
	e, err = Load(newMemory(t, 512<<20), file, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if e.Mode != Long64 || e.RIP != 16<<20+0x200 {
		t.Errorf("not unpacked: %+v", e)
	}
	if _, err := Load(newMemory(t, 16<<20), file, Options{}); err == nil || !strings.Contains(err.Error(), "give it more") {
		t.Errorf("in 16 MiB: %v", err)
	}
	for _, n := range []int{0x206, 1000, 20_000, len(file) - 100_000} {
		_, err := unpackAndLoad(newMemory(t, 512<<20), file[:n], Options{})
		checkError(t, err, "truncated")
	}
}

// Kernels that cannot be started are refused with an error of one line.
func TestForeignBzImages(t *testing.T) {
	put := func(at int, b ...byte) []byte {
		f := oldBzImage([]byte("payload"))
		copy(f[at:], b)
		return f
	}
	whole := put(0)
	for _, tt := range []struct {
		name string
		file []byte
		want string
	}{
		{"magic only", whole[:0x206], "truncated: file of 518 bytes, its setup header ends at 612"},
		{"header only", whole[:hdrEnd212], "truncated: file of 612 bytes, its setup code ends at 1536"},
		{"setup only", whole[:1536], "truncated"},
		{"half the code", whole[:2000], "its code ends at"},
		{"no boot flag", put(hdrBootFlag, 0), "boot flag: expected 0xaa55, found 0xaa00"},
		{"2.11", put(hdrVersion, 0x0b), "boot protocol: expected 2.12 or later (Linux 3.8, 2013), found 2.11"},
		{"zImage", put(hdrLoadFlags, 0), "found a zImage"},
		{"32-bit", put(hdrXLoadFlags, 0), "expected a 64-bit kernel"},
		{"short header", put(hdrJump+1, 0x10), "setup header must end between 0x264 and 0x290, found 0x212"},
		{"long header", put(hdrJump+1, 0xff), "found 0x301"},
		{"payload outside", put(hdrPayloadOffset+3, 0xff), "is not inside"},
		{"alignment 0", put(hdrAlignment, 0, 0, 0, 0), "alignment must be a power of two, found 0x0"},
		{"alignment 3", put(hdrAlignment, 3, 0, 0, 0), "alignment must be a power of two, found 0x3"},
		{"tiny init_size", put(hdrInitSize, 1, 0, 0, 0), "found 1"},
		{"huge init_size", put(hdrInitSize, 0, 0, 0, 0xff), "memory size in the header must be between"},
		{"fixed elsewhere", put(hdrRelocatable, 0, 0, xlfKernel64, 0, 255, 0, 0, 0), ""},
		{"fixed beyond RAM", put(hdrPrefAddress, 0, 0, 0, 0, 1), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(newMemory(t, 32<<20), tt.file, Options{})
			for _, err := range []error{err, Check(tt.file)} {
				if tt.want != "" {
					checkError(t, err, tt.want)
				} else if err != nil {
					t.Error(err)
				}
			}
		})
	}
	fixed := put(hdrPrefAddress, 0, 0, 0, 0x70)
	fixed[hdrRelocatable] = 0
	for _, tt := range []struct {
		name, want string
		opt        Options
		file       []byte
	}{
		{"fixed beyond RAM", "needs 4 MiB of RAM at 0x70000000", Options{}, fixed},
		{"long command line", "this kernel accepts at most 255", Options{Cmdline: strings.Repeat("x", 256)}, whole},
		{"two modules", "has at most one module", Options{Modules: make([]Module, 2)}, whole},
		{"large initrd", "no room for the initrd", Options{Modules: []Module{{Data: make([]byte, 31<<20)}}}, whole},
		{"many regions", "at most 128", Options{Reserved: make([]Region, 130)}, whole},
	} {
		_, err := Load(newMemory(t, 32<<20), tt.file, tt.opt)
		checkError(t, err, tt.want)
	}
}

// Any file is loaded or refused with an error, and all writes are inside RAM.
func FuzzLoadBzImage(f *testing.F) {
	elf := elftest.Build(elftest.Kernel{Code: []byte{0xf4}, Load: 16 << 20})
	for how := range compressors {
		f.Add(oldBzImage(pack(f, how, elf)), "cmdline", true)
	}
	f.Add(oldBzImage([]byte("\x89LZO")), "", false)
	f.Fuzz(func(t *testing.T, file []byte, cmdline string, unpack bool) {
		load := Load
		if unpack {
			load = unpackAndLoad
		}
		e, err := load(sparse{t, 64 << 20}, file, Options{Cmdline: cmdline, Modules: []Module{{Data: file}}})
		if err == nil && (e.RIP >= 64<<20 || e.RSI >= 64<<20 || e.CR3 >= 64<<20 || e.GDT >= 64<<20) {
			t.Errorf("entry %+v", e)
		}
	})
}
