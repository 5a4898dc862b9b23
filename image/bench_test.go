package image

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// benchmarkDisk is a disk with an ext4 of real files: IMPORT names one, else it has Go's tree.
func benchmarkDisk(b *testing.B, dir string) string {
	b.Helper()
	if from := os.Getenv("IMPORT"); from != "" {
		return from
	}
	raw := filepath.Join(dir, "disk.raw")
	out, err := exec.Command("go", "env", "GOROOT").Output()
	testenv.Check(b, err)
	tool(b, dir, "mke2fs", "-q", "-t", "ext4", "-d", string(out[:len(out)-1]), raw, "4G")
	return raw
}

// BenchmarkImport compares imports with those of qemu-img, in turn, to the same directory,
// until the disk is durable: seconds, processor seconds, and how many times ours qemu-img's are.
func BenchmarkImport(b *testing.B) {
	testenv.NeedTools(b, "qemu-img", "mke2fs")
	dir := b.TempDir()
	raw := benchmarkDisk(b, dir)
	for _, c := range []struct {
		name string
		args []string
	}{
		{"raw", nil},
		{"as-it-is", []string{"-O", "qcow2"}},
		{"zlib", []string{"-c", "-O", "qcow2"}},
		{"zstd", []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}},
	} {
		b.Run(c.name, func(b *testing.B) {
			from, format := raw, "raw"
			if c.args != nil {
				from, format = filepath.Join(dir, c.name), "qcow2"
				tool(b, dir, "qemu-img", append(append([]string{"convert", "-f", "raw"}, c.args...), raw, from)...)
				defer os.Remove(from)
			}
			to := filepath.Join(dir, "out.raw")
			var ours, theirs, ourCPU, theirCPU time.Duration
			for b.Loop() {
				cpu, began := processorTime(b), time.Now()
				_, err := Import(context.Background(), from, to, ImportOptions{Format: Format(format)})
				testenv.Check(b, err)
				ours, ourCPU = ours+time.Since(began), ourCPU+processorTime(b)-cpu
				testenv.Check(b, os.Remove(to))

				began = time.Now()
				cmd := exec.Command("qemu-img", "convert", "-f", format, "-O", "raw", from, to)
				if out, err := cmd.CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				f, err := os.Open(to)
				testenv.Check(b, err)
				testenv.Check(b, f.Sync())
				theirs, theirCPU = theirs+time.Since(began), theirCPU+cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()
				testenv.Check(b, f.Close())
				testenv.Check(b, os.Remove(to))
			}
			n := float64(b.N)
			b.ReportMetric(ours.Seconds()/n, "s")
			b.ReportMetric(ourCPU.Seconds()/n, "cpu-s")
			b.ReportMetric(theirs.Seconds()/ours.Seconds(), "qemu-img-s-ratio")
			b.ReportMetric(theirCPU.Seconds()/ourCPU.Seconds(), "qemu-img-cpu-s-ratio")
			b.Logf("%d processors: %.2f s, qemu-img %.2f s", runtime.GOMAXPROCS(0), ours.Seconds()/n, theirs.Seconds()/n)
		})
	}
}

// processorTime is what this process has used.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	testenv.Check(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
