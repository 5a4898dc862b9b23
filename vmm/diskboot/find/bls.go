package find

import (
	"cmp"
	"path"
	"slices"
	"strings"
)

// Entries of the Boot Loader Specification (uapi-group.org/specifications/specs/boot_loader_specification):
// type 1 are files with lines of a key and a value, type 2 are unified kernel images.

// blsKeys are what decides the order of entries.
type blsKeys struct {
	sortKey, machine, version string
	exhausted                 bool // no attempt to boot it is left
}

// blsEntries reads the entries in a directory. vars are GRUB's variables, which Fedora's
// entries use; nil: there are none.
func (s *search) blsEntries(v *volume, dir string, vars map[string]string) (entries []*Entry) {
	for _, name := range v.list(dir) {
		if !strings.HasSuffix(name, ".conf") || len(entries) >= maxEntries {
			continue
		}
		file := path.Join(dir, name)
		text, ok := v.text(file)
		if !ok {
			continue
		}
		if e := s.blsEntry(v, file, text, vars); e != nil {
			entries = append(entries, e)
		}
	}
	return entries
}

// blsEntry reads an entry; nil: it is not for a kernel that runs here.
func (s *search) blsEntry(v *volume, file, text string, vars map[string]string) *Entry {
	e := &Entry{Source: v.at(file)}
	var options []string
	var initrds []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		key, value := line, ""
		if i := strings.IndexAny(line, " \t"); i >= 0 {
			key, value = line[:i], strings.TrimSpace(line[i:])
		}
		switch key {
		case "title":
			e.Title = value
		case "version":
			e.keys.version = value
		case "machine-id":
			e.keys.machine = value
		case "sort-key":
			e.keys.sortKey = value
		case "options":
			options = append(options, expandVariables(value, vars))
		case "linux":
			e.kernel = ref{v, path.Clean("/" + value)}
		case "initrd":
			if len(initrds) < 64 {
				initrds = append(initrds, strings.Fields(expandVariables(value, vars))...)
			}
		case "efi", "uki":
			if u := s.uki(v, path.Clean("/"+value), false); u != nil {
				e.kernel, e.uki, e.Cmdline = u.kernel, u.uki, u.Cmdline
			}
		case "architecture":
			if a := strings.ToLower(value); a != "x64" && a != "x86_64" && a != "amd64" {
				return nil
			}
		}
	}
	if e.kernel.path == "" {
		return nil
	}
	// With /boot in the root's file system the paths are those of the boot loader, which may
	// leave it out, or of the system.
	e.kernel = v.either(e.kernel, file)
	for _, i := range initrds {
		e.initrds = append(e.initrds, v.either(ref{v, path.Clean("/" + i)}, file))
	}
	if len(options) > 0 || e.uki == nil {
		e.Cmdline = strings.Join(options, " ")
	}
	e.ID, e.keys.exhausted = blsID(path.Base(file))
	return e
}

// either is a file as it is named by an entry, or in the directory above loader.
func (v *volume) either(r ref, file string) ref {
	if _, ok := v.isFile(r.path); ok {
		return r
	}
	above := path.Dir(path.Dir(path.Dir(file)))
	if at := path.Join(above, r.path); above != "/" {
		if _, ok := v.isFile(at); ok {
			return ref{v, at}
		}
	}
	return r
}

// blsID is a file's name without its ending and its counters: NAME+LEFT-DONE.conf.
func blsID(name string) (id string, exhausted bool) {
	id = strings.TrimSuffix(strings.TrimSuffix(name, ".conf"), ".efi")
	if i := strings.LastIndexByte(id, '+'); i > 0 {
		left, done, _ := strings.Cut(id[i+1:], "-")
		if left != "" && strings.Trim(left+done, "0123456789") == "" {
			return id[:i], strings.Trim(left, "0") == ""
		}
	}
	return id, false
}

// expandVariables replaces $NAME and ${NAME} by GRUB's variables.
func expandVariables(s string, vars map[string]string) string {
	if vars == nil || !strings.Contains(s, "$") {
		return s
	}
	p := &grubParser{s: s}
	var b strings.Builder
	for len(p.s) > 0 && b.Len() < maxValue {
		if p.s[0] != '$' {
			b.WriteByte(p.s[0])
			p.s = p.s[1:]
			continue
		}
		if name, ok := p.variable(); ok {
			b.WriteString(vars[name])
		} else {
			b.WriteByte('$')
		}
	}
	return strings.TrimSpace(b.String())
}

// sortEntries puts the entry first that the specification would boot.
func sortEntries(entries []*Entry) {
	slices.SortStableFunc(entries, func(x, y *Entry) int {
		a, b := &x.keys, &y.keys
		if c := sign(a.exhausted, b.exhausted); c != 0 {
			return c
		}
		if c := sign(a.sortKey == "", b.sortKey == ""); c != 0 {
			return c
		}
		if a.sortKey != "" {
			if c := cmp.Or(cmp.Compare(a.sortKey, b.sortKey), cmp.Compare(a.machine, b.machine), -compareVersions(a.version, b.version)); c != 0 {
				return c
			}
		}
		return -compareVersions(x.ID, y.ID)
	})
}

// sortByID puts the newest first, as Fedora's GRUB has it.
func sortByID(entries []*Entry) {
	slices.SortStableFunc(entries, func(x, y *Entry) int { return -compareVersions(x.ID, y.ID) })
}

// blsSystem is the entries of systemd-boot, or of GRUB's blscfg, in a volume.
func (s *search) blsSystem(v *volume) (entries []*Entry) {
	for _, dir := range []string{"/loader", "/boot/loader"} {
		found := s.blsEntries(v, dir+"/entries", s.grubVariables(v))
		images := path.Join(dir, "../EFI/Linux")
		for _, name := range v.list(images) {
			if strings.HasSuffix(strings.ToLower(name), ".efi") && len(found) < maxEntries {
				if u := s.uki(v, path.Join(images, name), true); u != nil {
					found = append(found, u)
				}
			}
		}
		if len(found) == 0 {
			continue
		}
		sortEntries(found)
		found[s.blsDefault(v, dir, found)].Default = true
		return found
	}
	return nil
}

// blsDefault is the entry that loader.conf, or GRUB's environment, names.
func (s *search) blsDefault(v *volume, dir string, entries []*Entry) int {
	match := func(pattern string) int {
		for i, e := range entries {
			name := path.Base(e.Source)
			for _, n := range []string{e.ID, e.ID + ".conf", e.ID + ".efi", name} {
				if ok, err := path.Match(strings.ToLower(pattern), strings.ToLower(n)); err == nil && ok {
					return i
				}
			}
		}
		return -1
	}
	if text, ok := v.text(dir + "/loader.conf"); ok {
		for line := range strings.Lines(text) {
			if f := strings.Fields(line); len(f) == 2 && (f[0] == "default" || f[0] == "preferred") {
				if i := match(f[1]); i >= 0 {
					return i
				}
			}
		}
	}
	for _, id := range []string{s.saved["next_entry"], s.saved["saved_entry"]} {
		for i, e := range entries {
			if id != "" && (e.ID == id || e.Title == id) {
				return i
			}
		}
	}
	return 0
}
