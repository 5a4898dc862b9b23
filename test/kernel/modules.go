package kernel

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/ulikunitz/xz"
)

// DebianModules returns the path of one of Debian's kernels, a bzImage, and modules
// with their dependencies, in the order in which they can be loaded:
// "modules/NN-NAME.ko", for an initial RAM disk. The package is CloudKernel or
// "linux-image-amd64". The files are kept in the user's cache.
func DebianModules(pkg string, modules ...string) (vmlinuz string, files []File, err error) {
	sum := sha256.Sum256([]byte(strings.Join(modules, " ")))
	dir, err := inCache(fmt.Sprintf("%s-%x", pkg, sum[:6]), func(tmp string) (string, error) {
		if err := unpackDebian(tmp, behind(pkg)); err != nil {
			return "", err
		}
		return pickModules(filepath.Join(tmp, "x"), filepath.Join(tmp, "picked"), modules)
	})
	if err != nil {
		return "", nil, err
	}
	entries, err := os.ReadDir(filepath.Join(dir, "modules")) // in order
	if err != nil {
		return "", nil, err
	}
	files = []File{{Name: "modules", Mode: directory | 0o755}}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, "modules", e.Name()))
		if err != nil {
			return "", nil, err
		}
		files = append(files, File{Name: "modules/" + e.Name(), Data: data})
	}
	return filepath.Join(dir, "vmlinuz"), files, nil
}

// pickModules copies the kernel and the modules of an unpacked package to a
// new directory.
func pickModules(from, to string, modules []string) (string, error) {
	paths := make(map[string]string) // by name
	for _, pattern := range []string{"*.ko", "*.ko.xz"} {
		found, err := filesBelow(from, pattern)
		if err != nil {
			return "", err
		}
		for _, path := range found {
			name, _, _ := strings.Cut(filepath.Base(path), ".ko")
			paths[moduleName(name)] = path
		}
	}
	load := func(name string) ([]byte, error) {
		path, ok := paths[name]
		if !ok {
			return nil, fmt.Errorf("module %s: %w", name, os.ErrNotExist)
		}
		return readModule(path)
	}
	ordered, err := loadOrder(modules, load)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(to, "modules"), 0o755); err != nil {
		return "", err
	}
	for i, name := range ordered {
		data, err := load(name)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, "modules", fmt.Sprintf("%02d-%s.ko", i, name)), data, 0o644)
		}
		if err != nil {
			return "", err
		}
	}
	kernels, err := filesBelow(from, "boot/vmlinuz-*")
	if err == nil && len(kernels) != 1 {
		err = fmt.Errorf("%d kernels in one package", len(kernels))
	}
	if err != nil {
		return "", err
	}
	return to, os.Rename(kernels[0], filepath.Join(to, "vmlinuz"))
}

// moduleName is a module's name in the kernel's spelling: names of files and of
// dependencies mix - and _.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// loadOrder are the modules and their dependencies, each after its dependencies.
func loadOrder(modules []string, load func(name string) ([]byte, error)) (ordered []string, err error) {
	seen := make(map[string]bool)
	var visit func(name string) error
	visit = func(name string) error {
		if name = moduleName(name); seen[name] {
			return nil
		}
		seen[name] = true
		data, err := load(name)
		if err != nil {
			return err
		}
		needs, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return err
			}
		}
		ordered = append(ordered, name)
		return nil
	}
	for _, m := range modules {
		if err := visit(m); err != nil {
			return nil, err
		}
	}
	return ordered, nil
}

// moduleDepends reads a module's dependencies: "depends=a,b" in the section .modinfo,
// which has strings that end with 0 (scripts/mod/modpost.c in Linux).
func moduleDepends(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("no section .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}

// readModule reads a module's file; newer Debians compress them.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var r io.Reader = f
	if strings.HasSuffix(path, ".xz") {
		if r, err = xz.NewReader(f); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return io.ReadAll(r)
}
