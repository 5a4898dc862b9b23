package test

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

// keeper is a builder that keeps the memory that it has made.
type keeper struct{ made *memory.Memory }

func (k *keeper) Build(_ context.Context, config []byte) (migrate.Target, error) {
	mem, err := memory.New(binary.LittleEndian.Uint64(config), memory.DefaultBacking)
	if err != nil {
		return nil, err
	}
	k.made = mem
	return kept{still{mem}}, nil
}

// kept is memory that outlives its migration.
type kept struct{ still }

func (kept) Discard() error { return nil }

// TestHolesArriveAsHoles: the destination populates memory ahead of the data if it has
// a processor to spare. In the end only memory with data is populated: holes of the
// source are holes there, except those that share a huge page with data.
func TestHolesArriveAsHoles(t *testing.T) {
	const size, huge = 256 << 20, 2 << 20
	src, err := memory.New(size, memory.DefaultBacking)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	// Runs of full memory, each followed by a hole; both have several huge pages.
	r := rand.New(rand.NewPCG(3, 4))
	blocks := 0
	for at := 0; at < size; {
		full := min((1+r.IntN(12))*huge, size-at)
		ram := src.SlotBytes(0, uint64(at/mempage.Size), uint64(full/mempage.Size))
		for i := 0; i < len(ram); i += mempage.Size {
			binary.LittleEndian.PutUint64(ram[i:], r.Uint64()|1)
		}
		blocks += full / huge
		at += full + (1+r.IntN(6))*huge
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &keeper{}
	recv := migrate.NewReceiver(k, nil)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- recv.Serve(ctx, ln) }()
	mig := migrate.New(still{src}, ln.Addr().String(), migrate.Options{Channels: 1, VerifyPages: true})
	_, err = mig.Run(context.Background())
	if err == nil {
		<-recv.Arrived()
	}
	cancel()
	<-served
	if k.made != nil {
		defer k.made.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	pages, err := k.made.PopulatedPages()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MiB of %d are full; %d MiB are populated where they arrived", blocks*2, size>>20, pages*mempage.Size>>20)
	if pages < uint64(blocks)*huge/mempage.Size || pages > uint64(blocks)*huge/mempage.Size*102/100 {
		t.Errorf("%d pages are populated, %d have data", pages, blocks*huge/mempage.Size)
	}
}
