package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/govmm/govmm/test/kernel"
)

// underQEMU boots the guest under QEMU, in memory of which no page was zero or a
// hole before, and migrates it, with hints or without.
func (l *linux) underQEMU(tb testing.TB, f files, hints bool) qemuResult {
	tb.Helper()
	const size = 256 * mib // as linuxHints
	dir := tb.TempDir()
	start := func(name string, content []byte, incoming bool) (*qemu, string) {
		memory := filepath.Join(dir, fmt.Sprint(name, hints))
		if err := os.WriteFile(memory, content, 0o600); err != nil {
			tb.Fatal(err)
		}
		balloon := "virtio-balloon-pci"
		if hints {
			balloon += ",free-page-hint=on,iothread=hints"
		}
		return startQEMU(tb, size/mib, l.cpus, "console=ttyS0 "+kernel.Cmdline+" "+l.kernel+" -- "+l.words, incoming,
			"-kernel", f.kernel, "-initrd", f.initrd, "-object", "iothread,id=hints", "-device", balloon,
			"-machine", "memory-backend=ram", "-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,share=on,mem-path=%s", size, memory)), memory
	}
	await := func(memory string, what string, ok func(kernel.Report) bool) kernel.Report {
		for deadline := time.Now().Add(bootPatience); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
			file, err := os.Open(memory)
			if err != nil {
				tb.Fatal(err)
			}
			r, _, found := findReport(file)
			file.Close()
			if found && ok(r) {
				return r
			}
		}
		tb.Fatalf("no %s under QEMU", what)
		return kernel.Report{}
	}
	src, memory := start("source", bytes.Repeat([]byte{0x5a}, size), false)
	defer src.end()
	booted := await(memory, "first process", func(r kernel.Report) bool { return r.Verified > 0 })
	dst, memory := start("destination", nil, true) // fresh: QEMU makes it as large as it is to be
	defer dst.end()
	moved := src.migrate(dst, 1)
	after := await(memory, "pass at the destination", func(r kernel.Report) bool { return r.Passes >= booted.Passes+2 })
	if after.Bad != 0 {
		tb.Logf("QEMU, hints %t: memhog finds %d pages wrong", hints, after.Bad)
	}
	return moved
}

// BenchmarkLinuxHints migrates Linux, most of whose memory is free and holds an
// old content, with hints and without, by govmm and by QEMU.
func BenchmarkLinuxHints(b *testing.B) {
	needKVM(b)
	l := linuxHints(kernel.NoACPI, "init_on_alloc=0", "--prefill")
	f := l.prepare(b)
	for b.Loop() {
		m := l.boot(b)
		off, on := m.move(b, "--hints", "off"), m.move(b, "--hints", "on")
		b.Logf("govmm, hints off: %8.1f MB, %6d ms, downtime %4.0f ms", float64(off.BytesSent)/1e6, off.TotalMS, off.DowntimeMS)
		b.Logf("govmm, hints on:  %8.1f MB, %6d ms, downtime %4.0f ms", float64(on.BytesSent)/1e6, on.TotalMS, on.DowntimeMS)
		b.ReportMetric(float64(on.BytesSent)/float64(off.BytesSent), "of-bytes")
		var sent [2]uint64
		for i, hints := range []bool{false, true} {
			r := l.underQEMU(b, f, hints)
			b.Logf("QEMU, hints %-5t %8.1f MB, %6d ms, downtime %4d ms", hints, float64(r.Bytes)/1e6, r.Total.Milliseconds(), r.Downtime.Milliseconds())
			sent[i] = r.Bytes
		}
		b.ReportMetric(float64(sent[1])/float64(sent[0]), "QEMU-of-bytes")
	}
	b.ReportMetric(0, "ns/op")
}
