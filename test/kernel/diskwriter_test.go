package kernel

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// TestCheckWritten finds what is not as diskwriter wrote it.
func TestCheckWritten(t *testing.T) {
	words := make([]uint64, writerCount*(1+writerBlocks))
	words[2], words[writerCount+2*writerBlocks+1] = 3, 77 // the file 2 has three blocks, of which the second is no hole
	var sums []byte
	for _, w := range words {
		sums = binary.LittleEndian.AppendUint64(sums, w)
	}
	good := slices.Concat(make([]byte, mempage.Size), pattern(1, 1, 77), make([]byte, mempage.Size))
	flipped := slices.Clone(good)
	flipped[mempage.Size+9] ^= 1
	for name, c := range map[string]struct {
		data, sums []byte
		good       bool
	}{
		"good": {good, sums, true}, "flipped": {flipped, sums, false}, "a hole with data": {slices.Concat(good[:len(good)-1], []byte{1}), sums, false},
		"short": {good[:len(good)-mempage.Size], sums, false}, "sums": {good, sums[8:], false},
	} {
		dir := t.TempDir()
		err := os.Mkdir(filepath.Join(dir, writerFiles), 0o755)
		for name, b := range map[string][]byte{writerSums: c.sums, writerFiles + "/2": c.data} {
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckWritten(dir); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}
