package find

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
)

// Image is what an entry boots.
type Image struct {
	Cmdline        string
	Kernel, Initrd Stream
}

// Stream is bytes of the disk, of one file or more.
type Stream struct {
	Size   int64
	pieces []extent
}

// extent is a part of a stream.
type extent struct {
	what string // for people
	size int64
	open func() (io.Reader, error)
}

func (s *Stream) add(p extent) {
	s.Size += p.size
	s.pieces = append(s.pieces, p)
}

// WriteTo writes all of it. It implements [io.WriterTo].
func (s *Stream) WriteTo(w io.Writer) (n int64, err error) {
	for _, p := range s.pieces {
		r, err := p.open()
		if err == nil {
			var m int64
			m, err = io.CopyBuffer(struct{ io.Writer }{w}, io.LimitReader(r, p.size), make([]byte, min(p.size+1, readMost)))
			n += m
			if err == nil && m != p.size {
				err = io.ErrUnexpectedEOF
			}
		}
		if err != nil {
			return n, fmt.Errorf("read %s: %w", p.what, err)
		}
	}
	return n, nil
}

// Choose returns the entry with this id or title; "": the first one, which boots.
func Choose(entries []*Entry, name string) (*Entry, error) {
	if name == "" {
		return entries[0], nil
	}
	for _, by := range []func(*Entry) string{func(e *Entry) string { return e.ID }, func(e *Entry) string { return e.Title }} {
		for _, e := range entries {
			if by(e) == name {
				return e, nil
			}
		}
	}
	var names []string
	for _, e := range entries[:min(len(entries), 16)] {
		names = append(names, fmt.Sprintf("%.160q", e.ID))
	}
	return nil, fmt.Errorf("no entry %.160q: expected one of %s", name, strings.Join(names, ", "))
}

// Image is what the entry boots: its command line, and its files, which are opened.
func (e *Entry) Image() (*Image, error) {
	i := &Image{Cmdline: withConsole(e.Cmdline)}
	if len(i.Cmdline) > MaxCmdline {
		return nil, fmt.Errorf("%s: its command line has %d bytes: expected at most %d", e.Source, len(i.Cmdline), MaxCmdline)
	}
	i.Cmdline = strings.ReplaceAll(i.Cmdline, "\t", " ")
	for _, r := range i.Cmdline {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return nil, fmt.Errorf("%s: its command line %.80q is no line of text", e.Source, i.Cmdline)
		}
	}
	failed := func(r ref, err error) (*Image, error) {
		return nil, fmt.Errorf("read %.160q, which %s names: %w", r.path, e.Source, err)
	}
	var err error
	if e.uki != nil {
		if err = e.uki.stream(&i.Kernel, ".linux", MaxKernel); err == nil {
			err = e.uki.stream(&i.Initrd, ".initrd", MaxInitrd)
		}
	} else {
		err = e.kernel.stream(&i.Kernel, MaxKernel)
	}
	if err == nil && i.Kernel.Size == 0 {
		err = errors.New("it is empty")
	}
	if err != nil {
		return failed(e.kernel, err)
	}
	for _, r := range e.initrds {
		// Archives follow each other at multiples of four bytes.
		if pad := -i.Initrd.Size & 3; pad > 0 {
			i.Initrd.add(extent{"zeros", pad, func() (io.Reader, error) { return strings.NewReader("\x00\x00\x00"), nil }})
		}
		if err := r.stream(&i.Initrd, MaxInitrd-i.Initrd.Size); err != nil {
			return failed(r, err)
		}
	}
	return i, nil
}

// stream adds a file of at most so many bytes.
func (r ref) stream(s *Stream, most int64) error {
	if r.vol == nil {
		return errors.New("it is nowhere on this disk")
	}
	at, i, err := r.vol.resolve(r.path)
	switch {
	case err != nil:
		return err
	case !i.mode.IsRegular():
		return errors.New("it is not a file")
	case i.size > most:
		return fmt.Errorf("it has %d bytes: expected at most %d", i.size, most)
	}
	s.add(extent{r.path, i.size, func() (io.Reader, error) { return r.vol.Open(at) }})
	return nil
}

// withConsole adds the serial port to a command line that names no console.
func withConsole(cmdline string) string {
	for word := range strings.FieldsSeq(cmdline) {
		if strings.HasPrefix(word, "console=") {
			return cmdline
		}
	}
	return strings.TrimSpace(cmdline + " console=ttyS0")
}
