package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"
)

// fakeModule is an ELF file with nothing but .modinfo.
func fakeModule(modinfo string) []byte {
	const names = "\x00.modinfo\x00.shstrtab\x00"
	var b bytes.Buffer
	h := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Shoff: uint64(64 + len(modinfo) + len(names)), Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2,
	}
	_ = binary.Write(&b, binary.LittleEndian, h)
	b.WriteString(modinfo + names)
	for _, s := range []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(modinfo)), Size: uint64(len(names))},
	} {
		_ = binary.Write(&b, binary.LittleEndian, s)
	}
	return b.Bytes()
}

func TestLoadOrder(t *testing.T) {
	modules := map[string][]byte{
		"kvm_amd":   fakeModule("license=GPL\x00depends=kvm,ccp\x00name=kvm_amd\x00"),
		"kvm":       fakeModule("depends=irqbypass\x00"),
		"ccp":       fakeModule("depends=\x00"),
		"tun":       fakeModule("license=GPL\x00"),
		"lost":      fakeModule("depends=nowhere\x00"),
		"text":      []byte("not a module"),
		"irqbypass": fakeModule("depends=\x00"),
	}
	load := func(name string) ([]byte, error) {
		if data, ok := modules[name]; ok {
			return data, nil
		}
		return nil, os.ErrNotExist
	}
	got, err := loadOrder([]string{"tun", "kvm-amd", "kvm"}, load)
	if want := []string{"tun", "irqbypass", "kvm", "ccp", "kvm_amd"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := loadOrder([]string{"lost"}, load); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dependency that is not there: %v", err)
	}
	if _, err := loadOrder([]string{"text"}, load); err == nil {
		t.Error("text is taken for a module")
	}
}
