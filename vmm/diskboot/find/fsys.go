package find

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

const (
	maxLinks      = 16       // symbolic links on the way to one file
	maxPath       = 4096     // bytes
	maxDirectory  = 16 << 20 // bytes of an ext4 directory
	maxConfigFile = 1 << 20  // bytes of a boot loader's configuration
)

// fileSystem is one that is read. Paths are absolute and clean, and no directory in them is
// a symbolic link.
type fileSystem interface {
	// Lstat describes a file. If there is none the error is fs.ErrNotExist.
	Lstat(path string) (info, error)
	Readlink(path string) (string, error)
	// List names the files of a directory.
	List(path string) ([]string, error)
	Open(path string) (io.Reader, error)
}

// info describes a file.
type info struct {
	size int64
	mode fs.FileMode // its type
}

// volume is a file system of the disk.
type volume struct {
	partition
	fileSystem
	kind  string // ext4, vfat, squashfs, iso9660
	uuid  string // of the file system, as in UUID=; "": none
	label string
	notes []string // what went wrong in it
}

// at names a file of the volume for people.
func (v *volume) at(path string) string { return v.String() + ": " + path }

// resolve follows symbolic links within the volume, which can lead to no other.
func (v *volume) resolve(name string) (string, info, error) {
	if len(name) > maxPath || strings.IndexByte(name, 0) >= 0 {
		return "", info{}, fmt.Errorf("%.80q: no path of a file", name)
	}
	done, left := "/", components(name)
	i := info{mode: fs.ModeDir}
	for links := 0; len(left) > 0; {
		next := left[0]
		left = left[1:]
		if next == ".." {
			done, i = path.Dir(done), info{mode: fs.ModeDir}
			continue
		}
		if !i.mode.IsDir() {
			return "", info{}, fs.ErrNotExist
		}
		at := path.Join(done, next)
		var err error
		if i, err = v.Lstat(at); err != nil {
			return "", info{}, err
		}
		if i.mode&fs.ModeSymlink == 0 {
			done = at
			continue
		}
		if links++; links > maxLinks {
			return "", info{}, fmt.Errorf("%.80q: more than %d symbolic links", name, maxLinks)
		}
		target, err := v.Readlink(at)
		if err != nil {
			return "", info{}, err
		}
		if len(target) > maxPath || len(left) > maxPath {
			return "", info{}, fmt.Errorf("%.80q: its symbolic link is too long", name)
		}
		if strings.HasPrefix(target, "/") {
			done = "/"
		}
		left = append(components(target), left...)
		i = info{mode: fs.ModeDir}
	}
	return done, i, nil
}

// components splits a path.
func components(name string) []string {
	return slices.DeleteFunc(strings.Split(name, "/"), func(c string) bool { return c == "" || c == "." })
}

// exists says whether there is a file or directory.
func (v *volume) exists(name string) bool {
	_, _, err := v.resolve(name)
	return err == nil
}

// isFile returns the size of a file; ok is false if it is none.
func (v *volume) isFile(name string) (size int64, ok bool) {
	_, i, err := v.resolve(name)
	return i.size, err == nil && i.mode.IsRegular()
}

func (v *volume) isDir(name string) bool {
	_, i, err := v.resolve(name)
	return err == nil && i.mode.IsDir()
}

// list names the files of a directory, in order; none if there is no such directory.
func (v *volume) list(name string) []string {
	at, i, err := v.resolve(name)
	if err != nil || !i.mode.IsDir() {
		return nil
	}
	names, err := v.List(at)
	if err != nil {
		v.note("read the directory %s: %v", at, err)
		return nil
	}
	slices.Sort(names)
	return names
}

func (v *volume) note(format string, args ...any) {
	if len(v.notes) < 4 {
		v.notes = append(v.notes, fmt.Sprintf(format, args...))
	}
}

// text reads a configuration file. If it cannot be read, that is noted and ok is false.
func (v *volume) text(name string) (text string, ok bool) {
	b, err := v.readFile(name, maxConfigFile)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			v.note("read %s: %v", name, err)
		}
		return "", false
	}
	return string(b), true
}

// readFile reads a file of at most so many bytes.
func (v *volume) readFile(name string, most int64) ([]byte, error) {
	at, i, err := v.resolve(name)
	switch {
	case err != nil:
		return nil, err
	case !i.mode.IsRegular():
		return nil, errors.New("it is not a file")
	case i.size > most:
		return nil, fmt.Errorf("it has %d bytes: expected at most %d", i.size, most)
	}
	r, err := v.Open(at)
	if err != nil {
		return nil, err
	}
	b := make([]byte, i.size)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}
