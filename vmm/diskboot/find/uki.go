package find

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// ukiImage is a unified kernel image: an EFI program with the kernel, its initial RAM disk and
// its command line in sections
// (uapi-group.org/specifications/specs/unified_kernel_image).
type ukiImage struct {
	file     ref
	sections map[string]section
}

// section is a part of the file.
type section struct{ off, size int64 }

const (
	maxSections = 96
	maxImage    = 1 << 30
)

// uki reads a unified kernel image; nil: the file is none, which is noted if it should be.
func (s *search) uki(v *volume, file string, note bool) *Entry {
	u, err := readUKI(v, file)
	if err != nil {
		if note {
			v.note("%s: %v", file, err)
		}
		return nil
	}
	e := &Entry{Source: v.at(file), uki: u, kernel: ref{v, file}}
	e.ID, e.keys.exhausted = blsID(path.Base(file))
	e.Cmdline = u.text(".cmdline")
	e.keys.version = u.text(".uname")
	release := osRelease(u.text(".osrel"))
	e.Title = release["PRETTY_NAME"]
	if v := release["VERSION_ID"]; e.keys.version == "" {
		e.keys.version = v
	}
	if e.keys.sortKey = release["IMAGE_ID"]; e.keys.sortKey == "" {
		e.keys.sortKey = release["ID"]
	}
	return e
}

// osRelease reads lines of a name and a value, which may be quoted (os-release(5)).
func osRelease(text string) map[string]string {
	vars := make(map[string]string)
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && len(vars) < 256 {
			vars[k] = strings.Trim(v, `"'`)
		}
	}
	return vars
}

// readUKI reads the headers of a PE file.
func readUKI(v *volume, file string) (*ukiImage, error) {
	at, i, err := v.resolve(file)
	if err != nil {
		return nil, err
	}
	if !i.mode.IsRegular() || i.size > maxImage {
		return nil, fmt.Errorf("it is no file of at most %d bytes", int64(maxImage))
	}
	r, err := v.Open(at)
	if err != nil {
		return nil, err
	}
	head := make([]byte, min(i.size, 4096))
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	sections, err := peSections(head, i.size)
	if err != nil {
		return nil, err
	}
	u := &ukiImage{ref{v, at}, sections}
	if _, ok := u.sections[".linux"]; !ok {
		return nil, errors.New("an EFI program without a kernel (no section .linux)")
	}
	return u, nil
}

// peSections finds the sections of a PE file (Microsoft's PE Format).
func peSections(head []byte, size int64) (map[string]section, error) {
	le := binary.LittleEndian
	if len(head) < 64 || string(head[:2]) != "MZ" {
		return nil, errors.New("no EFI program")
	}
	at := int64(le.Uint32(head[0x3c:]))
	if at+24 > int64(len(head)) || string(head[at:at+4]) != "PE\x00\x00" {
		return nil, errors.New("no EFI program")
	}
	if machine := le.Uint16(head[at+4:]); machine != 0x8664 {
		return nil, fmt.Errorf("an EFI program for another processor (machine %#x)", machine)
	}
	n, optional := int64(le.Uint16(head[at+6:])), int64(le.Uint16(head[at+20:]))
	at += 24 + optional
	if n > maxSections || at+40*n > int64(len(head)) {
		return nil, fmt.Errorf("an EFI program with %d sections at %d: expected them in the first %d bytes", n, at, len(head))
	}
	sections := make(map[string]section)
	for range n {
		h := head[at : at+40]
		at += 40
		// The virtual size is that of the content; the raw one is rounded up.
		s := section{int64(le.Uint32(h[20:])), int64(min(le.Uint32(h[8:]), le.Uint32(h[16:])))}
		name := cString(h[:8])
		if _, twice := sections[name]; twice { // of another profile
			continue
		}
		if s.off+s.size > size {
			return nil, fmt.Errorf("its section %q ends at %d, behind the file's end at %d", name, s.off+s.size, size)
		}
		sections[name] = s
	}
	return sections, nil
}

// stream adds a section of at most so many bytes; nothing if there is none.
func (u *ukiImage) stream(to *Stream, name string, most int64) error {
	s, ok := u.sections[name]
	if !ok {
		return nil
	}
	if s.size > most {
		return fmt.Errorf("its section %s has %d bytes: expected at most %d", name, s.size, most)
	}
	to.add(extent{u.file.path + " " + name, s.size, func() (io.Reader, error) {
		r, err := u.file.vol.Open(u.file.path)
		if err == nil {
			_, err = io.CopyN(io.Discard, r, s.off)
		}
		return r, err
	}})
	return nil
}

// text is a section with a text of at most 64 KiB.
func (u *ukiImage) text(name string) string {
	var s Stream
	var b strings.Builder
	if u.stream(&s, name, 64<<10) != nil {
		return ""
	}
	if _, err := s.WriteTo(&b); err != nil {
		return ""
	}
	return strings.TrimSpace(strings.TrimRight(b.String(), "\x00"))
}
