package find

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/filesystem"
	"github.com/diskfs/go-diskfs/filesystem/fat12"
	"github.com/diskfs/go-diskfs/filesystem/fat16"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
	"github.com/diskfs/go-diskfs/filesystem/squashfs"
)

// FAT, squashfs and ISO 9660 are read by go-diskfs, which was not written for hostile bytes:
// each call of it is guarded against panics, and the process that reads a disk bounds
// time and memory. Its ext4 is not used: it reads holes, unwritten extents and block maps
// wrongly, and knows no inline data and no journal. Nor is its reading of partitions, which
// leaves out logical ones.

// storage is a partition as go-diskfs wants it.
type storage struct {
	*io.SectionReader
	size int64
}

var _ backend.Storage = (*storage)(nil)

func (s *storage) Stat() (fs.FileInfo, error)              { return nil, errors.ErrUnsupported }
func (s *storage) Close() error                            { return nil }
func (s *storage) Sys() (*os.File, error)                  { return nil, errors.ErrUnsupported }
func (s *storage) Writable() (backend.WritableFile, error) { return nil, errors.ErrUnsupported }
func (s *storage) Path() string                            { return "" }

// goDiskFS is a file system that go-diskfs reads.
type goDiskFS struct {
	filesystem.FileSystem
	anyCase bool // names are the same in upper and lower case
	known   map[string][]fs.DirEntry
}

// guarded calls f, and turns a panic into an error.
func guarded(f func() error) (err error) {
	defer func() {
		if e := recover(); e != nil {
			err = fmt.Errorf("its file system is damaged: %.200v", e)
		}
	}()
	return f()
}

// openFAT opens a FAT, whose width the number of its clusters decides.
func openFAT(r io.ReaderAt, size int64) (*goDiskFS, error) {
	s := &storage{io.NewSectionReader(r, 0, size), size}
	g := &goDiskFS{anyCase: true}
	bits, err := fatBits(r)
	if err != nil {
		return nil, err
	}
	err = guarded(func() (err error) {
		switch bits {
		case 32:
			g.FileSystem, err = fat32.Read(s, size, 0, 0)
		case 16:
			g.FileSystem, err = fat16.Read(s, size, 0, 0)
		default:
			g.FileSystem, err = fat12.Read(s, size, 0, 0)
		}
		return err
	})
	return g, err
}

func openSquashfs(r io.ReaderAt, size int64) (*goDiskFS, error) {
	g := &goDiskFS{}
	err := guarded(func() error {
		fsys, err := squashfs.Read(&storage{io.NewSectionReader(r, 0, size), size}, size, 0, 0)
		if err != nil {
			return err
		}
		fsys.SetCacheSize(8 << 20)
		g.FileSystem = fsys
		return nil
	})
	return g, err
}

func openISO(r io.ReaderAt, size int64) (*goDiskFS, error) {
	g := &goDiskFS{anyCase: true}
	err := guarded(func() (err error) {
		g.FileSystem, err = iso9660.Read(&storage{io.NewSectionReader(r, 0, size), size}, size, 0, 2048)
		return err
	})
	return g, err
}

// relative is a path as package io/fs wants it.
func relative(name string) string {
	if name = strings.Trim(name, "/"); name == "" {
		return "."
	}
	return name
}

// entries lists a directory.
func (g *goDiskFS) entries(dir string) (list []fs.DirEntry, err error) {
	if list, ok := g.known[dir]; ok {
		return list, nil
	}
	err = guarded(func() (err error) {
		list, err = g.ReadDir(relative(dir))
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(g.known) > 64 || g.known == nil {
		g.known = make(map[string][]fs.DirEntry)
	}
	g.known[dir] = list
	return list, nil
}

// entry finds a file, and its name as it is written there.
func (g *goDiskFS) entry(name string) (e fs.DirEntry, real string, err error) {
	dir := path.Dir(name)
	if dir != "/" {
		if _, dir, err = g.entry(dir); err != nil {
			return nil, "", err
		}
	}
	list, err := g.entries(dir)
	if err != nil {
		return nil, "", err
	}
	for _, e := range list {
		if n := e.Name(); n == path.Base(name) || g.anyCase && strings.EqualFold(n, path.Base(name)) {
			return e, path.Join(dir, n), nil
		}
	}
	return nil, "", fs.ErrNotExist
}

// Lstat implements [fileSystem].
func (g *goDiskFS) Lstat(name string) (i info, err error) {
	if name == "/" {
		return info{mode: fs.ModeDir}, nil
	}
	e, _, err := g.entry(name)
	if err != nil {
		return info{}, err
	}
	err = guarded(func() error {
		if e.IsDir() {
			i.mode = fs.ModeDir
			return nil
		}
		st, err := e.Info()
		if err == nil {
			i = info{size: st.Size(), mode: st.Mode().Type()}
		}
		return err
	})
	if err == nil && i.size < 0 {
		err = fmt.Errorf("a file of %d bytes", i.size)
	}
	return i, err
}

// Readlink implements [fileSystem].
func (g *goDiskFS) Readlink(name string) (target string, err error) {
	e, _, err := g.entry(name)
	if err != nil {
		return "", err
	}
	err = guarded(func() (err error) {
		ok := false
		switch l := e.(type) {
		case interface{ ReadLink() (string, bool) }: // ISO 9660
			target, ok = l.ReadLink()
		case interface{ Readlink() (string, error) }: // squashfs
			target, err = l.Readlink()
			ok = err == nil
		}
		if !ok && err == nil {
			err = errors.New("it is no symbolic link")
		}
		return err
	})
	return target, err
}

// List implements [fileSystem].
func (g *goDiskFS) List(name string) (names []string, err error) {
	if name != "/" {
		if _, name, err = g.entry(name); err != nil {
			return nil, err
		}
	}
	list, err := g.entries(name)
	for _, e := range list {
		if n := e.Name(); n != "." && n != ".." && n != "" {
			names = append(names, n)
		}
	}
	return names, err
}

// Open implements [fileSystem].
func (g *goDiskFS) Open(name string) (r io.Reader, err error) {
	_, real, err := g.entry(name)
	if err != nil {
		return nil, err
	}
	err = guarded(func() error {
		f, err := g.FileSystem.Open(relative(real))
		r = guardedReader{f}
		return err
	})
	return r, err
}

// guardedReader reads a file of go-diskfs.
type guardedReader struct{ r io.Reader }

// Read implements [io.Reader].
func (g guardedReader) Read(p []byte) (n int, err error) {
	p = p[:min(len(p), readMost)]
	err = guarded(func() (err error) {
		n, err = g.r.Read(p)
		return err
	})
	if n < 0 || n > len(p) {
		return 0, errors.New("its file system is damaged")
	}
	return n, err
}
