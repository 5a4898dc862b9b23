package image

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkImport imports the image that IMPORT names, again and again.
func BenchmarkImport(b *testing.B) {
	from := os.Getenv("IMPORT")
	if from == "" {
		b.Skip("IMPORT names no image")
	}
	to := filepath.Join(filepath.Dir(from), "benchmark.raw")
	defer os.Remove(to)
	for b.Loop() {
		done, err := Import(context.Background(), from, to, ImportOptions{Force: true})
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(done.Size)
	}
}
