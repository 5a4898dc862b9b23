package image

import (
	"errors"
	"os"
	"syscall"

	"github.com/govmm/govmm/image/qcow2"
)

// Info describes an image.
type Info struct {
	Path        string `json:"path"`
	Format      Format `json:"format"`
	Compression string `json:"compression,omitempty"` // of the file as a whole
	Size        int64  `json:"size"`                  // of the disk, bytes; 0: a file that is compressed does not say
	FileSize    int64  `json:"file_size"`             // bytes
	OnDisk      int64  `json:"on_disk"`               // bytes that the file takes, without holes
	Qcow2       *Qcow2 `json:"qcow2,omitempty"`
	// Below are the backing files, the nearest first.
	Below []Layer `json:"backing,omitempty"`
}

// Qcow2 is what a qcow2 image says about itself.
type Qcow2 struct {
	Version       uint32 `json:"version"`
	ClusterSize   int64  `json:"cluster_size"` // bytes
	Compression   string `json:"compression"`  // of the clusters that are compressed
	RefcountBits  uint32 `json:"refcount_bits"`
	LazyRefcounts bool   `json:"lazy_refcounts"`
	Subclusters   bool   `json:"extended_l2"`
	Dirty         bool   `json:"dirty"`
	Snapshots     uint32 `json:"snapshots"` // inside of the file; they are not read
}

// Layer is a backing file.
type Layer struct {
	Name   string `json:"name"`
	Format Format `json:"format"`
	Size   int64  `json:"size"` // of the disk, bytes
}

func headerOf(f *os.File) (*qcow2.Header, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return qcow2.ParseHeader(f, st.Size())
}

// Inspect describes the image at path; format is as in [Detect]. The image is open for as
// long as the reader is not closed, which is nil for a file that is compressed as a whole.
func Inspect(path string, format Format) (*Info, Reader, error) {
	f, err := openFor(path)
	if err != nil {
		return nil, nil, err
	}
	k, err := Detect(f, path, format)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	i := &Info{Path: path, Format: k.Format, Compression: k.Compression}
	if st, err := f.Stat(); err == nil {
		i.FileSize, i.OnDisk = st.Size(), allocated(st)
	}
	if k.Compression != "" {
		return i, nil, f.Close()
	}
	r, err := OpenFile(f, path, k.Format)
	if err != nil {
		return nil, nil, err
	}
	i.Size = r.Size()
	if l, ok := r.(*layered); ok {
		i.describe(l)
	}
	return i, r, nil
}

func (i *Info) describe(l *layered) {
	h := l.Header
	i.Qcow2 = &Qcow2{Version: h.Version, ClusterSize: h.ClusterSize(), Compression: h.Compression, RefcountBits: h.RefcountBits,
		LazyRefcounts: h.LazyRefcounts, Subclusters: h.ExtendedL2, Dirty: h.Dirty, Snapshots: h.Snapshots}
	for below := l.below; below != nil; {
		switch b := below.(type) {
		case *layered:
			i.Below = append(i.Below, Layer{Name: b.name, Format: QCOW2, Size: b.Size()})
			below = b.below
		case *raw:
			i.Below = append(i.Below, Layer{Name: b.File.Name(), Format: Raw, Size: b.Size()})
			return
		}
	}
}

// allocated is how many bytes a file takes where it is stored.
func allocated(st os.FileInfo) int64 {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return s.Blocks * 512 // stat(2): of 512 bytes, whatever the file system's are
}
