package blk

import (
	"bytes"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

// A seed is a disk with its content, which nobody can change.
func TestSeed(t *testing.T) {
	content := bytes.Repeat([]byte("seed"), 1000*SectorSize/4)
	s := &SeedSpec{Content: content}
	testenv.Check(t, s.Validate())
	b, err := s.Open(nil)
	testenv.Check(t, err)
	defer b.Close()
	dev, err := b.Attach(virtio.Guest{})
	testenv.Check(t, err)
	d := dev.(*Device)
	if d.Size() != uint64(len(content)) || d.Features()&FeatureReadOnly == 0 {
		t.Errorf("%d bytes, features %#x", d.Size(), d.Features())
	}
	got := make([]byte, len(content))
	testenv.Check(t, d.image.read([][]byte{got}, 0, new(scratch)))
	if !bytes.Equal(got, content) {
		t.Error("the content differs")
	}
	if _, err := unix.Pwrite(d.image.fd, []byte("x"), 0); err == nil {
		t.Error("the content was written")
	}
	for _, n := range []int{0, 511, 513, MaxSeed + SectorSize} {
		if err := (&SeedSpec{Content: make([]byte, n)}).Validate(); err == nil || !strings.Contains(err.Error(), "seed of") {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if _, is := any(s).(virtio.Mover); is {
		t.Error("a seed names something of its host")
	}
}
