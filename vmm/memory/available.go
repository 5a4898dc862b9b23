package memory

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/govmm/govmm/mempage"
)

// Admit is the rule for how much memory a guest may have on this host, when it is
// started and when it arrives: no more than is available without swapping, of this
// host and in each control group that this process is in. The error has the numbers.
// overcommit lifts the rule, except where nothing can be overcommitted: a pool of huge
// pages, and what the kernel and the VMM need for their own tables.
func Admit(size uint64, b Backing, overcommit bool) error {
	h := thisHost
	err := h.admit(size, b, overcommit)
	if err == nil {
		return nil
	}
	info, _ := h.fields("proc/meminfo", "MemTotal:")
	for began := time.Now(); err != nil && size <= info["MemTotal:"]<<10 && time.Since(began) < admitPatience; {
		time.Sleep(admitPause)
		err = h.admit(size, b, overcommit)
	}
	return err
}

// A VM that has just ended, or moved away, may still be freeing its memory.
const (
	admitPatience = time.Second
	admitPause    = 50 * time.Millisecond
)

// Available returns how many bytes of memory of this backing a guest can have on this
// host.
func Available(b Backing) (uint64, error) {
	room, err := thisHost.room(b)
	return room.bytes, err
}

// perPage is what the kernel and the VMM need for each guest page, in bytes: KVM's
// reverse map of 8 bytes where it shadows page tables, and bitmaps.
const perPage = 10

// host is the root of a host's files.
type host struct{ root fs.FS }

// room is what one thing of a host has left for a guest.
type room struct {
	bytes     uint64
	says      string // whose room it is, with its numbers
	pool      bool   // it is the pool of huge pages
	hugePages uint64 // the pages of this pool, free or not
}

func (h host) admit(size uint64, b Backing, overcommit bool) error {
	r, err := h.room(b)
	if err != nil {
		return fmt.Errorf("find out how much memory is available: %w", err)
	}
	tables := size / mempage.Size * perPage
	switch {
	case size <= r.bytes:
		return nil
	case b == Hugetlb || !overcommit:
		return fmt.Errorf("memory of %d MiB (%s): %s", size>>20, b, r.tooLittle(size, b))
	case tables > r.bytes:
		return fmt.Errorf("memory of %d MiB (%s), whose tables take %d MiB: %s", size>>20, b, tables>>20, r.says)
	}
	return nil
}

// tooLittle says what there is instead of memory of this size, and what to do.
func (r room) tooLittle(size uint64, b Backing) string {
	remedy := "make it smaller, or allow overcommit"
	switch {
	case r.pool:
		remedy = fmt.Sprintf("add more with `sysctl vm.nr_hugepages=%d`, or use backing %s", r.hugePages+(size-min(size, r.bytes)+hugePageSize-1)/hugePageSize, DefaultBacking)
	case b == Hugetlb:
		remedy = "make it smaller, or use backing " + string(DefaultBacking)
	}
	return r.says + "; " + remedy
}

// room returns the smallest of all.
func (h host) room(b Backing) (room, error) {
	r, err := h.general()
	limits := memoryGroups
	if b == Hugetlb && err == nil {
		r, err = h.pool(r.bytes)
		limits = hugetlbGroups
	}
	if err != nil {
		return room{}, err
	}
	groups, err := h.groups(limits)
	return slices.MinFunc(append(groups, r), func(a, b room) int { return cmp.Compare(a.bytes, b.bytes) }), err
}

// general is what the host has of ordinary memory (proc_meminfo(5)).
func (h host) general() (room, error) {
	info, err := h.fields("proc/meminfo", "MemAvailable:", "MemTotal:", "CommitLimit:", "Committed_AS:")
	if err != nil {
		return room{}, err
	}
	for _, key := range []string{"MemAvailable:", "MemTotal:"} {
		if _, ok := info[key]; !ok {
			return room{}, fmt.Errorf("/proc/meminfo: expected a line %s", key)
		}
	}
	have, total := info["MemAvailable:"]<<10, info["MemTotal:"]<<10
	r := room{bytes: have, says: fmt.Sprintf("this host has %d MiB available, of %d MiB", have>>20, total>>20)}
	// With strict accounting memory is also charged before it is used.
	if mode, err := h.number("proc/sys/vm/overcommit_memory"); err == nil && mode == 2 {
		limit, used := info["CommitLimit:"]<<10, info["Committed_AS:"]<<10
		if left := limit - min(limit, used); left < r.bytes {
			r = room{bytes: left, says: fmt.Sprintf("this host has %d MiB left to commit, of %d MiB (vm.overcommit_memory is 2)", left>>20, limit>>20)}
		}
	}
	return r, nil
}

// pool is what is left of the huge pages of 2 MiB
// (Documentation/admin-guide/mm/hugetlbpage.rst): those that are free and not reserved,
// and those that the kernel may add from ordinary memory, of which it has so many bytes.
func (h host) pool(general uint64) (room, error) {
	const dir = "sys/kernel/mm/hugepages/hugepages-2048kB/"
	var n [5]uint64
	for i, name := range []string{"nr_hugepages", "free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"} {
		var err error
		if n[i], err = h.number(dir + name); errors.Is(err, fs.ErrNotExist) {
			return room{}, fmt.Errorf("this kernel has no huge pages of 2 MiB (no /%s%s)", dir, name)
		} else if err != nil {
			return room{}, err
		}
	}
	total, free, reserved, overcommit, surplus := n[0], n[1], n[2], n[3], n[4]
	more := min(overcommit-min(overcommit, surplus), general/hugePageSize)
	pages := free - min(free, reserved) + more
	return room{pages * hugePageSize, fmt.Sprintf("this host has %d MiB available in huge pages of 2 MiB (of %d, %d are free, %d of these reserved; %d may be added)",
		pages*hugePageSize>>20, total, free, min(free, reserved), more), true, total}, nil
}

// groupFiles are the files of a control group that limit a resource, in cgroups of
// version 1 and 2.
type groupFiles struct {
	controller string
	v1, v2     []limitFiles
}

// limitFiles are a limit and what is used of it. Of what is used, the lines of
// memory.stat that begin with these words can be taken back.
type limitFiles struct {
	limit, usage string
	reclaimable  []string
}

// See Documentation/admin-guide/cgroup-v1/memory.rst and hugetlb.rst, and
// cgroup-v2.rst. Above memory.high a group is slowed down until it stands still.
var (
	memoryGroups = groupFiles{
		controller: "memory",
		v1:         []limitFiles{{"memory.limit_in_bytes", "memory.usage_in_bytes", []string{"total_inactive_file", "total_active_file"}}},
		v2: []limitFiles{
			{"memory.max", "memory.current", []string{"inactive_file", "active_file", "slab_reclaimable"}},
			{"memory.high", "memory.current", []string{"inactive_file", "active_file", "slab_reclaimable"}},
		},
	}
	hugetlbGroups = groupFiles{
		controller: "hugetlb",
		v1: []limitFiles{
			{"hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.usage_in_bytes", nil},
			{"hugetlb.2MB.rsvd.limit_in_bytes", "hugetlb.2MB.rsvd.usage_in_bytes", nil},
		},
		v2: []limitFiles{
			{"hugetlb.2MB.max", "hugetlb.2MB.current", nil},
			{"hugetlb.2MB.rsvd.max", "hugetlb.2MB.rsvd.current", nil},
		},
	}
)

// groups lists what the control groups of this process, and all above them that can be
// seen here, have left.
func (h host) groups(files groupFiles) (all []room, err error) {
	memberships, err := h.read("proc/self/cgroup")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a kernel without control groups
	} else if err != nil {
		return nil, err
	}
	mounts, err := h.groupMounts(files.controller)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(memberships)) {
		// hierarchy:controllers:path, and 0::path of version 2.
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		v2, limits := f[0] == "0" && f[1] == "", files.v1
		if v2 {
			limits = files.v2
		} else if !slices.Contains(strings.Split(f[1], ","), files.controller) {
			continue
		}
		top, below, ok := mountOf(mounts, v2, files.controller, f[2])
		for ok {
			dir := path.Join(top, below)
			for _, l := range limits {
				r, limited, err := h.left(dir, l)
				if err != nil {
					return nil, err
				}
				if limited {
					all = append(all, r)
				}
			}
			if below == "." || below == "/" {
				break
			}
			below = path.Dir(below)
		}
	}
	return all, nil
}

// noLimit is version 1's way to say that there is none: LONG_MAX in whole pages.
const noLimit = math.MaxInt64 &^ (mempage.Size - 1)

// left is what a limit of one control group has left.
func (h host) left(dir string, l limitFiles) (r room, limited bool, err error) {
	text, err := h.read(path.Join(dir, l.limit))
	if errors.Is(err, fs.ErrNotExist) || string(bytes.TrimSpace(text)) == "max" {
		return r, false, nil // the root of version 2, a controller that is off, no limit
	}
	if errors.Is(err, fs.ErrPermission) {
		return r, false, nil // it cannot be seen: the process came into it when it was in a sandbox already
	}
	limit, used := uint64(0), uint64(0)
	if err == nil {
		limit, err = number(dir+"/"+l.limit, text)
	}
	if err == nil && limit >= noLimit {
		return r, false, nil
	}
	if err == nil {
		used, err = h.number(path.Join(dir, l.usage))
	}
	if err == nil && l.reclaimable != nil {
		var stat map[string]uint64
		stat, err = h.fields(path.Join(dir, "memory.stat"), l.reclaimable...)
		for _, key := range l.reclaimable {
			used -= min(used, stat[key])
		}
	}
	if err != nil {
		return r, false, err
	}
	have := limit - min(limit, used)
	return room{bytes: have, says: fmt.Sprintf("the control group /%s has %d MiB available, of %d MiB (%s)", dir, have>>20, limit>>20, l.limit)}, true, nil
}

// groupMount is where a hierarchy of control groups is mounted.
type groupMount struct {
	root, at string // the group that is mounted, and where
	v2       bool
	options  []string // of the file system: version 1's controllers
}

// groupMounts reads proc_pid_mountinfo(5), of version 1 what may have the controller.
func (h host) groupMounts(controller string) (all []groupMount, err error) {
	text, err := h.read("proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(line, " - ")
		if !strings.HasPrefix(after, "cgroup2 ") && (!strings.HasPrefix(after, "cgroup ") || !strings.Contains(after, controller)) {
			continue
		}
		f, system := strings.Fields(before), strings.Fields(after)
		if len(f) < 5 || len(system) < 3 || system[0] != "cgroup" && system[0] != "cgroup2" {
			continue
		}
		all = append(all, groupMount{unescape(f[3]), strings.TrimPrefix(unescape(f[4]), "/"), system[0] == "cgroup2",
			strings.Split(system[2], ",")})
	}
	return all, nil
}

// unescape undoes what the kernel does to spaces, tabs, newlines and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// mountOf finds the mount that shows the control group, and as many above it as any.
// below is the group's path there.
func mountOf(mounts []groupMount, v2 bool, controller, group string) (top, below string, ok bool) {
	for _, m := range mounts {
		if m.v2 != v2 || !v2 && !slices.Contains(m.options, controller) {
			continue
		}
		rest, inside := strings.CutPrefix(group, strings.TrimSuffix(m.root, "/"))
		if inside && rest != "" && rest[0] != '/' {
			inside = false
		}
		if inside && (!ok || len(rest) > len(below)) {
			top, below, ok = m.at, path.Join("/", rest), true
		}
	}
	return top, below, ok
}

func (h host) read(name string) ([]byte, error) { return fs.ReadFile(h.root, name) }

// number reads a file that holds one number.
func (h host) number(name string) (uint64, error) {
	text, err := h.read(name)
	if err != nil {
		return 0, err
	}
	return number(name, text)
}

func number(name string, text []byte) (uint64, error) {
	n, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("/%s: expected a number, found %.40q", name, text)
	}
	return n, nil
}

// fields reads these words of a file of lines of a word and a number.
func (h host) fields(name string, words ...string) (map[string]uint64, error) {
	text, err := h.read(name)
	if err != nil {
		return nil, err
	}
	all := map[string]uint64{}
	for line := range strings.Lines(string(text)) {
		word, rest, _ := strings.Cut(line, " ")
		if !slices.Contains(words, word) {
			continue
		}
		if f := strings.Fields(rest); len(f) > 0 {
			if n, err := strconv.ParseUint(f[0], 10, 64); err == nil {
				all[word] = n
			}
		}
	}
	return all, nil
}
