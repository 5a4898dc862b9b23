package loader

import (
	"encoding/binary"
	"testing"

	"github.com/govmm/govmm/vmm/loader/elftest"
)

// change returns a valid kernel with other bytes at an offset.
func change(at int, b ...byte) []byte {
	f := elftest.Build(elftest.Kernel{Code: []byte{0xf4}})
	copy(f[at:], b)
	return f
}

// Offsets in the files that elftest builds.
const (
	loadHeader = 64
	noteHeader = 64 + 56
	note       = 64 + 2*56
)

func TestForeignFiles(t *testing.T) {
	u64 := func(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }
	whole := change(0)
	bzImage := make([]byte, 4096)
	copy(bzImage, "MZ")
	copy(bzImage[0x202:], "HdrS")
	for _, tt := range []struct {
		name string
		file []byte
		want string // in the error; empty: it loads
	}{
		{"good", whole, ""},
		{"empty", nil, "empty file"},
		{"text", []byte("#!/bin/sh\n"), "not an ELF file; expected a Linux bzImage, or an uncompressed"},
		{"bzImage", bzImage, "compressed Linux kernel (bzImage); expected an uncompressed 64-bit x86 ELF with a PVH entry"},
		{"gzip", []byte("\x1f\x8b\x08\x00"), "gzip file; expected"},
		{"EFI", []byte("MZ\x90"), "EFI or DOS"},
		{"magic only", []byte("\x7fELF"), "truncated after 4 bytes"},
		{"header only", whole[:64], "truncated"},
		{"no code", whole[:0x1000], "truncated"},
		{"32-bit", change(4, 1), "32-bit ELF file; expected"},
		{"no class", change(4, 7), "unknown class 7"},
		{"big-endian", change(5, 2), "big-endian"},
		{"AArch64", change(18, 183), "another processor (machine 183)"},
		{"object file", change(16, 1), "not an executable (type 1)"},
		{"position independent", change(16, 3), ""},
		{"no program headers", change(56, 0, 0), "program headers must be between 1 and 256, found 0"},
		{"too many program headers", change(56, 0xff, 0xff), "found 65535"},
		{"odd program headers", change(54, 32), "expected program headers of 56 bytes, found 32"},
		{"program headers beyond the end", change(32, u64(1<<40)...), "truncated"},
		{"program headers that wrap", change(32, u64(^uint64(0)-10)...), "truncated"},
		{"segment beyond the end", change(loadHeader+8, u64(1<<62)...), "truncated"},
		{"segment that wraps", change(loadHeader+8, u64(^uint64(0))...), "truncated"},
		{"segment of 2^63", change(loadHeader+32, u64(1<<63)...), "truncated"},
		{"more in file than in memory", change(loadHeader+40, 0), "has 0x1 bytes in the file and 0x0 in memory"},
		{"no segment", change(loadHeader, 6), "without segments to load"},
		{"no note segment", change(noteHeader, 6), "64-bit ELF file without a PVH entry note; expected"},
		{"another note", change(note+8, 1), "without a PVH entry note"},
		{"another owner", change(note+12, 'G'), "without a PVH entry note"},
		{"note of 2^32 bytes", change(note+4, 0xff, 0xff, 0xff, 0xff), "without a PVH entry note"},
		{"note name of 2^32 bytes", change(note, 0xff, 0xff, 0xff, 0xff), "without a PVH entry note"},
		{"note of 2 bytes", change(note+4, 2), "expected a PVH entry note of 4 or 8 bytes, found 2"},
		{"note segment of 2^64", change(noteHeader+32, u64(^uint64(0))...), "truncated"},
		{"memory of 2^64", change(loadHeader+40, u64(^uint64(0))...), "outside of the guest's 16 MiB of RAM"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := loadPVH(newMemory(t, 16<<20), tt.file, Options{})
			if early := Check(tt.file); early != nil && err == nil {
				t.Errorf("it loads, but: %v", early)
			}
			if tt.want != "" {
				checkError(t, err, tt.want)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// Notes are padded to 4 or 8 bytes, are beside others, and have an entry of 4 or 8
// bytes.
func TestFindEntry(t *testing.T) {
	le := binary.LittleEndian
	build := func(pad int, notes ...[3]any) []byte {
		var b []byte
		align := func() {
			for len(b)%pad != 0 {
				b = append(b, 0)
			}
		}
		for _, n := range notes {
			name, kind, desc := n[0].(string)+"\x00", n[1].(int), n[2].([]byte)
			b = le.AppendUint32(b, uint32(len(name)))
			b = le.AppendUint32(b, uint32(len(desc)))
			b = le.AppendUint32(b, uint32(kind))
			b = append(b, name...)
			align()
			b = append(b, desc...)
			align()
		}
		return b
	}
	entry4, entry8 := le.AppendUint32(nil, 0x1234000), le.AppendUint64(nil, 0x1234000)
	gnu := [3]any{"GNU", 3, make([]byte, 20)}
	for _, tt := range []struct {
		name  string
		notes []byte
		align uint64
		ok    bool
	}{
		{"4", build(4, gnu, [3]any{"Xen", 18, entry4}), 4, true},
		{"4 of 8 bytes", build(4, [3]any{"Xen", 6, []byte("linux\x00")}, [3]any{"Xen", 18, entry8}), 4, true},
		{"8", build(8, gnu, [3]any{"Xen", 18, entry8}), 8, true},
		{"4 in a segment aligned to 8", build(4, gnu, [3]any{"Xen", 18, entry4}), 8, true},
		{"alignment 0", build(4, gnu, [3]any{"Xen", 18, entry4}), 0, true},
		{"none", build(4, gnu, gnu), 4, false},
		{"empty", nil, 4, false},
		{"cut short", build(4, [3]any{"Xen", 18, entry4})[:19], 4, false},
	} {
		entry, ok, err := findEntry(tt.notes, tt.align)
		if err != nil || ok != tt.ok || (ok && entry != 0x1234000) {
			t.Errorf("%s: %#x, %v, %v", tt.name, entry, ok, err)
		}
	}
	high := build(4, [3]any{"Xen", 18, le.AppendUint64(nil, 1<<32)})
	if _, _, err := findEntry(high, 4); err == nil {
		t.Error("an entry above 4 GiB was accepted")
	}
}

// sparse is memory that checks ranges and stores nothing.
type sparse struct {
	t    *testing.T
	size uint64
}

func (m sparse) Size() uint64 { return m.size }

func (m sparse) WriteAt(p []byte, gpa uint64) error {
	if n := uint64(len(p)); n > m.size || gpa > m.size-n {
		m.t.Fatalf("write of %d bytes at %#x", n, gpa)
	}
	return nil
}

// Any file is loaded or refused with an error, and all writes are inside RAM.
func FuzzLoadPVH(f *testing.F) {
	f.Add(elftest.Build(elftest.Kernel{Code: []byte("\xf4code"), BSS: 1 << 16}), "cmdline")
	f.Add(elftest.Build(elftest.Kernel{Load: 0x6000, Code: []byte{0xf4}}), "")
	f.Add([]byte("\x7fELF\x02\x01\x01"), "x")
	f.Fuzz(func(t *testing.T, file []byte, cmdline string) {
		entry, err := loadPVH(sparse{t, 64 << 20}, file, Options{Cmdline: cmdline, Modules: []Module{{Data: file}}})
		if err != nil {
			return
		}
		if entry.RIP >= 64<<20 || entry.RBX+startInfoSize > 64<<20 || entry.RBX%4 != 0 {
			t.Errorf("entry %+v", entry)
		}
	})
}
