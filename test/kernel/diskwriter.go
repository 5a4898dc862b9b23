package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/govmm/govmm/mempage"
)

// Where diskwriter has its files, and says what they must have (init/diskwriter.c).
const (
	writerFiles = "data"
	writerSums  = "sums"
)

// The number of diskwriter's files, and of blocks in the largest.
const (
	writerCount  = 8
	writerBlocks = 64
)

// CheckWritten compares the files that diskwriter has left in a directory with what it says
// of them.
func CheckWritten(dir string) error {
	raw, err := os.ReadFile(filepath.Join(dir, writerSums))
	if err != nil {
		return err
	}
	if len(raw) != 8*writerCount*(1+writerBlocks) {
		return fmt.Errorf("%s has %d bytes", writerSums, len(raw))
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(raw[8*i:]) }
	for file := range writerCount {
		blocks, path := word(file), filepath.Join(dir, writerFiles, fmt.Sprint(file))
		got, err := os.ReadFile(path)
		if err != nil && (!os.IsNotExist(err) || blocks > 0) {
			return err
		}
		if uint64(len(got)) != blocks*mempage.Size {
			return fmt.Errorf("%s has %d bytes, and not %d blocks", path, len(got), blocks)
		}
		for b := range int(blocks) {
			want := make([]byte, mempage.Size)
			if generation := word(writerCount + file*writerBlocks + b); generation > 0 {
				want = pattern(b, 1, generation)
			}
			if !bytes.Equal(got[b*mempage.Size:(b+1)*mempage.Size], want) {
				return fmt.Errorf("%s: block %d is not what was written", path, b)
			}
		}
	}
	return nil
}
