package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

var usual = Config{
	CPUs: 2, ECAM: 0xe0000000, Buses: 256,
	MMIO: Window{0xc0000000, 0x20000000},
}

// The addresses, starting from the RSDP, lead to all tables. They are complete and
// have valid checksums.
func TestBuild(t *testing.T) {
	le := binary.LittleEndian
	for _, cpus := range []int{1, 2, 32, 255, 256, 300} {
		cfg := usual
		cfg.CPUs = cpus
		tables, rsdp, err := Build(cfg)
		if err != nil {
			t.Fatal(err)
		}
		at := func(gpa uint64) []byte {
			for _, table := range tables {
				if table.GPA == gpa {
					return table.Data
				}
			}
			t.Fatalf("no table at %#x", gpa)
			return nil
		}
		end := uint64(0)
		for _, table := range tables {
			if table.GPA < end || table.GPA%16 != 0 {
				t.Errorf("%s at %#x, the one before ends at %#x", table.Name, table.GPA, end)
			}
			end = table.GPA + uint64(len(table.Data))
			if table.Name != "FACS" && sum(table.Data) != 0 {
				t.Errorf("%s: wrong checksum", table.Name)
			}
			if table.Name != "RSDP" && (string(table.Data[:4]) != table.Name || int(le.Uint32(table.Data[4:])) != len(table.Data)) {
				t.Errorf("%s: header % x", table.Name, table.Data[:36])
			}
		}
		if end > tablesEnd || rsdp < 0xe0000 {
			t.Errorf("tables from %#x to %#x", rsdp, end)
		}
		root := at(rsdp)
		if string(root[:8]) != "RSD PTR " || sum(root[:20]) != 0 {
			t.Errorf("RSDP % x", root)
		}
		var names []string
		for x := at(le.Uint64(root[24:]))[36:]; len(x) > 0; x = x[8:] {
			table := at(le.Uint64(x))
			names = append(names, string(table[:4]))
			switch names[len(names)-1] {
			case "FACP":
				if dsdt := at(le.Uint64(table[140:])); !bytes.HasPrefix(dsdt, []byte("DSDT")) {
					t.Error("no DSDT")
				}
				if facs := at(uint64(le.Uint32(table[36:]))); !bytes.HasPrefix(facs, []byte("FACS")) {
					t.Error("no FACS")
				}
			case "APIC":
				checkMADT(t, table[44:], cpus)
			}
		}
		if got := strings.Join(names, " "); got != "FACP APIC MCFG" {
			t.Errorf("XSDT names %s", got)
		}
	}
}

// checkMADT counts the CPUs; the ids are 0, 1, 2 and so on.
func checkMADT(t *testing.T, entries []byte, cpus int) {
	le := binary.LittleEndian
	next := uint32(0)
	for e := entries; len(e) > 0; e = e[e[1]:] {
		id := uint32(e[3])
		switch e[0] {
		case 0:
		case 9:
			id = le.Uint32(e[4:])
		default:
			continue
		}
		if id != next || (e[0] == 0) != (id < 255) {
			t.Errorf("CPU %d has id %d in an entry of type %d", next, id, e[0])
		}
		next++
	}
	if int(next) != cpus {
		t.Errorf("%d CPUs, not %d", next, cpus)
	}
}

// Intel's disassembler reads the tables, and they have the configured values.
func TestTablesByIASL(t *testing.T) {
	testenv.NeedTools(t, "iasl")
	dir := t.TempDir()
	cfg := usual
	cfg.CPUs = 257
	tables, _, err := Build(cfg)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{
		"FACP": {"GPE0 Block Address : 00000608", "GPE0 Block Length : 02", "Power Button (V1) : 0", "Reset Register Supported (V2) : 1", "Value to cause reset : 06", "Address : 0000000000000600", "SCI Interrupt : 0009"},
		"APIC": {"Subtable Type : 09 [Processor Local x2APIC]", "Processor x2Apic ID : 00000100", "Interrupt : 00000002", "Interrupt : 00000009"},
		"MCFG": {"Base Address : 00000000E0000000", "End Bus Number : FF"},
		"XSDT": {"ACPI Table Address   2"},
		"FACS": {"Version : 02"},
		"DSDT": {"0xE0000000,", "0xC0000000,", "0xDFFFFFFF,", "0x20000000,", "0x00FF,", "0x0100,", "PNP0A08", "QEMU0001", "PNP0501", "PNP0B00", "_S5", `_CID, "VM_Gen_Counter"`, "0x000EF010,", "Notify (\\_SB.VGEN, 0x80)"},
	}
	for _, table := range tables {
		if table.Name == "RSDP" {
			continue
		}
		path := filepath.Join(dir, table.Name+".dat")
		if err := os.WriteFile(path, table.Data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("iasl", "-d", path).CombinedOutput()
		if err != nil {
			t.Fatalf("iasl -d %s: %v\n%s", table.Name, err, out)
		}
		for _, word := range []string{"Error", "Warning", "Invalid", "Incorrect"} {
			if bytes.Contains(out, []byte(word)) {
				t.Errorf("iasl about %s:\n%s", table.Name, out)
			}
		}
		text, err := os.ReadFile(filepath.Join(dir, table.Name+".dsl"))
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range want[table.Name] {
			if !bytes.Contains(text, []byte(w)) {
				t.Errorf("%s has no %q:\n%s", table.Name, w, text)
			}
		}
		if table.Name == "DSDT" && bytes.Contains(text, []byte("0x5A")) {
			t.Errorf("a constant was left:\n%s", text)
		}
	}
}

// The committed AML is iasl's output for the source.
func TestDSDTIsBuilt(t *testing.T) {
	testenv.NeedTools(t, "make", "iasl")
	if out, err := exec.Command("make", "-s", "check").CombinedOutput(); err != nil {
		t.Errorf("make check: %v\n%s", err, out)
	}
}

func TestBuildRefuses(t *testing.T) {
	for _, tt := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.CPUs = 0 }, "number of CPUs must be 1 or more, got 0"},
		{func(c *Config) { c.CPUs = 10_000 }, "for 10000 CPUs"},
		{func(c *Config) { c.Buses = 257 }, "PCI buses must be between 1 and 256, got 257"},
		{func(c *Config) { c.ECAM = 0xe0100000 }, "aligned"},
		{func(c *Config) { c.ECAM = 1 << 32 }, "below 4 GiB"},
		{func(c *Config) { c.MMIO.Size = 1 << 30; c.MMIO.Base += 1 }, "PCI window of"},
		{func(c *Config) { c.MMIO.Size = 0 }, "PCI window of"},
	} {
		cfg := usual
		tt.change(&cfg)
		if _, _, err := Build(cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, not %q", cfg, err, tt.want)
		}
	}
}

func ExampleBuild() {
	tables, rsdp, err := Build(Config{
		CPUs: 2, ECAM: 0xe0000000, Buses: 256,
		MMIO: Window{0xc0000000, 0x20000000},
	})
	if err != nil {
		panic(err)
	}
	fmt.Printf("RSDP at %#x:", rsdp)
	for _, t := range tables {
		fmt.Print(" ", t.Name)
	}
	// Output: RSDP at 0xe0000: RSDP FACS DSDT FACP APIC MCFG XSDT
}
