package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
)

// maxClusters is how many clusters the file of an image that is checked may have: a bit is
// kept for each that is used.
const maxClusters = 1 << 31

// Use is what the tables of an image use of its file, in clusters.
type Use struct {
	Normal     int64 `json:"normal"`     // of the disk, as they are
	Compressed int64 `json:"compressed"` // of the disk
	Zero       int64 `json:"zero"`       // of the disk, marked as zeros
}

// Check reads all tables, and fails if an entry breaks a rule of the format or if two
// entries use the same cluster of the file. So the disk of an image that passes has no more
// than what its file has, as it is or compressed, and zeros. It takes memory in
// proportion to the file, 4 KiB for each 32768 clusters that are used.
func (im *Image) Check(ctx context.Context) (Use, error) {
	c := checker{Image: im}
	clusters := (im.tables.size + im.ClusterSize() - 1) >> im.ClusterBits
	if clusters > maxClusters {
		return c.use, damaged("a file of %d clusters of %d bytes: expected at most %d", clusters, im.ClusterSize(), int64(maxClusters))
	}
	c.plain, c.packed = newMarks(clusters), newMarks(clusters)
	c.plain.set(0) // the header's
	for at := im.l1Offset; at < im.l1Offset+im.l1Size*8; at += im.ClusterSize() {
		if err := c.claim(at); err != nil {
			return c.use, fmt.Errorf("its first table: %w", err)
		}
	}
	for i := range im.l1Size {
		if i%1024 == 0 && ctx.Err() != nil {
			return c.use, context.Cause(ctx)
		}
		table, err := im.secondTable(i)
		if err == nil && table != 0 {
			if err = c.claim(table); err == nil {
				err = c.table(ctx, table, i)
			}
		}
		if err != nil {
			return c.use, fmt.Errorf("entry %d of its first table: %w", i, err)
		}
	}
	return c.use, nil
}

// checker notes which clusters of the file are used.
type checker struct {
	*Image
	plain, packed marks // by tables and normal clusters, by compressed ones
	use           Use
}

// claim notes that the cluster of the file at an offset is used, by one.
func (c *checker) claim(off int64) error {
	n := off >> c.ClusterBits
	if c.plain.set(n) || c.packed.has(n) {
		return damaged("the cluster at offset %d of its file is used twice", off)
	}
	return nil
}

// claimPacked notes that compressed data is in the file, where there may be more of it.
func (c *checker) claimPacked(e extent) error {
	for n := e.host >> c.ClusterBits; n <= (e.host+e.stored-1)>>c.ClusterBits; n++ {
		if c.packed.set(n); c.plain.has(n) {
			return damaged("the cluster at offset %d of its file is used twice", n<<c.ClusterBits)
		}
	}
	return nil
}

// table checks the entries of a second table, the index-th.
func (c *checker) table(ctx context.Context, off, index int64) error {
	entries := c.ClusterSize() / c.entryBytes()
	used := min(entries, (c.DiskSize-index*entries<<c.ClusterBits+c.ClusterSize()-1)>>c.ClusterBits)
	for i := int64(0); i < used; {
		b, err := c.tables.at(off + i*c.entryBytes())
		if err != nil {
			return err
		}
		for ; i < used && len(b) > 0; i++ {
			if err := c.check(b); err != nil {
				return fmt.Errorf("the cluster at %d of the disk: %w", (index*entries+i)<<c.ClusterBits, err)
			}
			b = b[c.entryBytes():]
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// check checks the entry at b.
func (c *checker) check(b []byte) error {
	entry := binary.BigEndian.Uint64(b)
	if entry == 0 && !c.ExtendedL2 {
		return nil
	}
	e, err := c.entry(b, 0)
	if err != nil {
		return err
	}
	if e.kind == compressed {
		c.use.Compressed++
		return c.claimPacked(e)
	}
	host := int64(entry & offsetMask)
	switch {
	case e.kind == zero:
		c.use.Zero++
	case host != 0:
		c.use.Normal++
	}
	if host == 0 || host >= c.tables.size { // zeros that have a place which was never written
		return nil
	}
	return c.claim(host)
}

// marks is a set of numbers of clusters.
type marks [][]uint64

const (
	markBits  = 32768
	markWords = markBits / 64
)

func newMarks(n int64) marks { return make(marks, (n+markBits-1)/markBits) }

func (m marks) has(n int64) bool {
	page := m[n/markBits]
	return page != nil && page[n%markBits/64]>>(n%64)&1 != 0
}

// set adds a number, and reports whether it was there.
func (m marks) set(n int64) bool {
	if m.has(n) {
		return true
	}
	page := &m[n/markBits]
	if *page == nil {
		*page = make([]uint64, markWords)
	}
	(*page)[n%markBits/64] |= 1 << (n % 64)
	return false
}
