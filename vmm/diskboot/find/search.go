// Package find finds the kernel of the system on a disk: its file, its initial RAM disk
// and its command line. It reads what a guest has written, which may be anything: all
// that it does is bounded in work and memory, and all that it names is in the disk. It is
// run in a process of its own all the same, see package diskboot.
package find

import (
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
)

// Bounds of what is found.
const (
	MaxKernel  = 128 << 20 // bytes
	MaxInitrd  = 256 << 20 // bytes, of all initial RAM disks of an entry
	MaxCmdline = 2047      // bytes
)

// ref is a file of a volume; without a volume it is on none that is known.
type ref struct {
	vol  *volume
	path string
}

// Entry is a way to boot.
type Entry struct {
	ID, Title string
	Source    string // where it was found
	Cmdline   string
	Default   bool // it is the one of its source that boots if nobody chooses

	kernel  ref
	initrds []ref
	uki     *ukiImage // kernel is a unified kernel image
	keys    blsKeys
}

// Kernel names the kernel's file for people.
func (e *Entry) Kernel() string { return e.kernel.path }

// Initrds names the files of the initial RAM disk.
func (e *Entry) Initrds() (names []string) {
	for _, r := range e.initrds {
		names = append(names, r.path)
	}
	return names
}

// search is one search of a disk.
type search struct {
	volumes []*volume
	others  []string          // what is on the disk and is not read
	saved   map[string]string // GRUB's saved variables
	vars    map[string]string // and those of its configuration; nil: not read yet
	wrong   []string          // configurations that cannot be used
}

// Disk looks for ways to boot on a disk. The entries are in the order in which they are
// preferred; the first one is what boots. If there is none the error says what was looked
// for.
func Disk(r io.ReaderAt, size int64) ([]*Entry, error) {
	d := newDisk(r, size)
	parts, err := partitions(d, size)
	if err != nil {
		return nil, err
	}
	s := &search{}
	for _, p := range parts {
		v, why := openVolume(d, p)
		if v == nil {
			s.others = append(s.others, fmt.Sprintf("%s: %s", p, why))
			continue
		}
		s.volumes = append(s.volumes, v)
	}
	entries := s.entries()
	if d.read > maxRead {
		return nil, errReadEnough
	}
	if len(entries) == 0 {
		return nil, s.nothing()
	}
	return entries, nil
}

// entries looks for each kind of configuration in all volumes, before the next kind. The
// first that has an entry whose files are there decides.
func (s *search) entries() []*Entry {
	s.loadSaved()
	for _, look := range []func(v *volume) []*Entry{
		s.blsSystem,
		func(v *volume) []*Entry { return s.configs(v, grubConfigs, s.grubSystem) },
		func(v *volume) []*Entry { return s.configs(v, extlinuxConfigs, s.extlinuxSystem) },
		s.efiPrograms,
	} {
		for _, v := range s.volumes {
			if list := s.usable(look(v)); len(list) > 0 {
				return list
			}
		}
	}
	for _, v := range s.volumes {
		if list := s.usable(s.plainSystem(v)); len(list) > 0 {
			return list
		}
	}
	return nil
}

// usable leaves the entries whose kernels are there, the one that boots first.
func (s *search) usable(entries []*Entry) (list []*Entry) {
	var missing []string
	for _, e := range entries {
		at, where := e.kernel, "nowhere on this disk"
		if at.vol != nil {
			where = at.vol.String()
			if size, ok := at.vol.isFile(at.path); ok && size > 0 {
				if e.Default {
					list = append([]*Entry{e}, list...)
				} else {
					list = append(list, e)
				}
				continue
			}
		}
		missing = append(missing, fmt.Sprintf("%s: %.80q is not there (%s)", e.Source, at.path, where))
	}
	if len(list) == 0 && len(missing) > 0 {
		s.complain(missing[0])
	}
	return list
}

func (s *search) complain(what string) {
	if len(s.wrong) < 8 {
		s.wrong = append(s.wrong, what)
	}
}

// configs tries files of a volume that may be a boot loader's configuration.
func (s *search) configs(v *volume, files []string, read func(*volume, string) ([]*Entry, error)) []*Entry {
	for _, f := range files {
		entries, err := read(v, f)
		if err != nil {
			s.complain(fmt.Sprintf("%s: %v", v.at(f), err))
		}
		if entries = s.usable(entries); len(entries) > 0 {
			return entries
		}
	}
	return nil
}

// efiPrograms are unified kernel images where a firmware looks without a boot loader.
func (s *search) efiPrograms(v *volume) (entries []*Entry) {
	for _, dir := range []string{"/EFI/BOOT", "/EFI/Linux", "/boot/EFI/BOOT", "/boot/efi/EFI/Linux"} {
		for _, name := range v.list(dir) {
			if strings.HasSuffix(strings.ToLower(name), ".efi") && len(entries) < maxEntries {
				if e := s.uki(v, path.Join(dir, name), false); e != nil {
					entries = append(entries, e)
				}
			}
		}
	}
	if len(entries) > 0 {
		sortEntries(entries)
		entries[0].Default = true
	}
	return entries
}

// device is the volume of a name of GRUB's; nil: it is none of this disk.
func (s *search) device(name string) *volume {
	name, _, _ = strings.Cut(name, "/")
	for _, v := range s.volumes {
		if v.grub() == name || v.number != 0 && "hd0,"+strconv.Itoa(v.number) == name {
			return v
		}
	}
	return nil
}

// loadSaved reads GRUB's saved variables, which choose an entry and have words for command
// lines.
func (s *search) loadSaved() {
	s.saved = make(map[string]string)
	for _, v := range s.volumes {
		for _, f := range []string{"/grub2/grubenv", "/boot/grub2/grubenv", "/grub/grubenv", "/boot/grub/grubenv", "/EFI/fedora/grubenv"} {
			for k, value := range grubEnv(v, f) {
				if _, has := s.saved[k]; !has {
					s.saved[k] = value
				}
			}
		}
	}
}

// grubVariables are those that GRUB's configuration gives to entries of the Boot Loader
// Specification; nil: no GRUB is there.
func (s *search) grubVariables(v *volume) map[string]string {
	if s.vars != nil {
		return s.vars
	}
	s.vars = make(map[string]string)
	for k, value := range s.saved {
		s.vars[k] = value
	}
	for _, v := range append([]*volume{v}, s.volumes...) {
		for _, f := range grubConfigs {
			text, ok := v.text(f)
			if !ok {
				continue
			}
			list, err := parseGrub(text)
			if err != nil {
				continue
			}
			g := newGrub(s, v, f)
			for k, value := range s.saved {
				g.vars[k] = value
			}
			g.n = maxEntries // none is wanted
			if _, err := g.run(list); err == nil {
				s.vars = g.vars
				return s.vars
			}
		}
	}
	return s.vars
}

// nothing says what was looked for.
func (s *search) nothing() error {
	what := "no kernel: neither entries of the Boot Loader Specification, nor a grub.cfg, an extlinux.conf, a unified kernel image or a vmlinuz"
	var found []string
	for _, v := range s.volumes {
		found = append(found, fmt.Sprintf("%s: %s", v.partition, v.kind))
		found = append(found, v.notes...)
	}
	found = append(found, s.others...)
	found = append(found, s.wrong...)
	if len(found) > 0 {
		what += " (" + strings.Join(found[:min(len(found), 24)], "; ") + ")"
	}
	return &noKernel{what}
}

// noKernel is the error for a disk on which nothing was found.
type noKernel struct{ what string }

func (n *noKernel) Error() string { return n.what }

func itoa(n int) string { return strconv.Itoa(n) }
