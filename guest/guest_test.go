package guest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"regexp"
	"strings"
	"testing"
)

func open(t *testing.T) *elf.File {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(ELF))
	if err != nil {
		t.Fatalf("demo.elf: %v", err)
	}
	return f
}

func TestELF(t *testing.T) {
	if len(ELF) >= 64<<10 {
		t.Errorf("demo.elf has %d bytes, want less than 64 KiB", len(ELF))
	}
	f := open(t)
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		t.Errorf("demo.elf is %v %v %v, want a 64-bit x86-64 executable", f.Class, f.Machine, f.Type)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && (p.Paddr < 1<<20 || p.Paddr+p.Memsz > 2<<20 || p.Paddr != p.Vaddr) {
			t.Errorf("segment [%#x, %#x) at %#x: want it inside [1 MiB, 2 MiB), with equal physical and virtual addresses",
				p.Paddr, p.Paddr+p.Memsz, p.Vaddr)
		}
	}
}

// The PVH note is in a PT_NOTE segment aligned to 4: name "Xen", type 18, the entry's address.
func TestPVHNote(t *testing.T) {
	f := open(t)
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		note := make([]byte, p.Filesz)
		if _, err := p.ReadAt(note, 0); err != nil {
			t.Fatalf("note: %v", err)
		}
		if p.Align != 4 || len(note) != 24 {
			t.Fatalf("note: align %d, %d bytes; want 4 and 24", p.Align, len(note))
		}
		le := binary.LittleEndian
		if le.Uint32(note) != 4 || le.Uint32(note[4:]) != 8 || le.Uint32(note[8:]) != 18 || string(note[12:16]) != "Xen\x00" {
			t.Fatalf("note: % x", note)
		}
		if entry := le.Uint64(note[16:]); entry != f.Entry || entry < 1<<20 || entry >= 2<<20 {
			t.Errorf("note: entry %#x, ELF header: %#x", entry, f.Entry)
		}
		return
	}
	t.Fatal("no PT_NOTE segment")
}

// words matches the words of docs/guest.md.
var words = regexp.MustCompile(`^((fill|dirty|pool|keep|disk)=[0-9]+[KMGTkmgt]?|(rate|zeros|churn|drate)=[0-9]+|hintrace(=[0-9]+)?|(hints|reports)=[01]|` +
	`ip=[0-9.]+|(verify|tick)=[0-9]+(\.[0-9]+)?|stop|help|poweroff|reboot|crash)$`)

func TestDefaultCmdline(t *testing.T) {
	fields := strings.Fields(DefaultCmdline)
	if len(fields) == 0 {
		t.Fatal("DefaultCmdline has no word")
	}
	for _, w := range fields {
		if !words.MatchString(w) {
			t.Errorf("DefaultCmdline: the guest does not know %q", w)
		}
	}
}

// The help that the guest prints has all words of the documentation.
func TestHelpNamesEveryWord(t *testing.T) {
	for _, w := range []string{"fill=SIZE", "dirty=SIZE", "rate=PAGES/S", "verify=SECONDS", "zeros=N", "tick=SECONDS", "stop",
		"pool=SIZE", "keep=SIZE", "churn=PAGES/S", "hintrace[=N]", "hints=0|1", "reports=0|1", "disk=SIZE", "drate=PAGES/S", "ip=ADDRESS", "poweroff", "reboot", "crash", "help"} {
		if !bytes.Contains(ELF, []byte(w)) {
			t.Errorf("demo.elf: its help lacks %q", w)
		}
	}
}
