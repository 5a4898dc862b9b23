package memory

import (
	"io"
	"io/fs"
	"os"
	"sync"
)

// keptFiles are the files of this host. Each is opened when it is read for the first time,
// stays open, and is read from its beginning again: a process that has gone into a sandbox
// since, or has given up its rights, learns what is available now.
type keptFiles struct {
	readMu sync.Mutex // guards files; held while one is read, since a file of procfs has one buffer
	files  map[string]*os.File
}

// thisHost is the host that this process runs on.
var thisHost = host{&keptFiles{files: map[string]*os.File{}}}

var _ fs.ReadFileFS = (*keptFiles)(nil)

// Open implements [fs.FS].
func (k *keptFiles) Open(name string) (fs.File, error) { return os.DirFS("/").Open(name) }

// mostOfFile bounds what is read of a file: these are of some lines.
const mostOfFile = 16 << 20

// ReadFile implements [fs.ReadFileFS].
func (k *keptFiles) ReadFile(name string) ([]byte, error) {
	k.readMu.Lock()
	defer k.readMu.Unlock()
	if f := k.files[name]; f != nil {
		text, err := io.ReadAll(io.NewSectionReader(f, 0, mostOfFile))
		if err == nil {
			return text, nil
		}
		_ = f.Close() // a control group that was removed
		delete(k.files, name)
	}
	f, err := os.Open("/" + name)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, mostOfFile))
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	k.files[name] = f
	return text, nil
}

// Prepare opens the files that tell how much memory is available, of any backing, and which
// pages are populated, for a process that will be in a sandbox when it calls [Admit] and
// [New].
func Prepare() {
	_, _ = pagemapFile()
	for _, b := range []Backing{DefaultBacking, Hugetlb} {
		_, _ = thisHost.room(b) // whoever needs it gets the error
	}
}
