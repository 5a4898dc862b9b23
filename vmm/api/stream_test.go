package api_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

type outcome struct {
	res migrate.Result
	err error
}

// follow runs f in a goroutine and returns its first progress and its outcome.
func follow(f func(func(migrate.Progress)) (migrate.Result, error)) (first chan migrate.Progress, end chan outcome) {
	first, end = make(chan migrate.Progress, 1), make(chan outcome, 1)
	go func() {
		res, err := f(func(p migrate.Progress) {
			select {
			case first <- p:
			default:
			}
		})
		end <- outcome{res, err}
	}()
	return first, end
}

func wait[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

// The result gets out although the process shuts down the moment it is known.
func TestLastLineBeatsShutdown(t *testing.T) {
	for range 20 {
		vm := &fakeVM{migration: newFakeMigration()}
		c, stop := serve(t, t.TempDir(), "", vm)
		first, end := follow(func(f func(migrate.Progress)) (migrate.Result, error) {
			return c.Migrate(context.Background(), api.MigrateRequest{To: "h:1"}, f)
		})
		if p := wait(t, "progress", first); p.Round != 1 {
			t.Errorf("%+v", p)
		}
		vm.migration.end(migrate.Result{Status: "completed", Total: 7 * time.Millisecond, Rounds: []migrate.RoundStats{{N: 1}}})
		stop()
		got := wait(t, "result", end)
		if got.err != nil || got.res.Status != "completed" || got.res.Total != 7*time.Millisecond || len(got.res.Rounds) != 1 {
			t.Fatalf("%+v", got)
		}
	}
}

func TestClientLeavesMigrationStays(t *testing.T) {
	vm := &fakeVM{migration: newFakeMigration()}
	c, _ := serve(t, t.TempDir(), "", vm)
	ctx, leave := context.WithCancel(context.Background())
	first, end := follow(func(f func(migrate.Progress)) (migrate.Result, error) {
		return c.Migrate(ctx, api.MigrateRequest{To: "h:1"}, f)
	})
	wait(t, "progress", first)
	leave()
	if got := wait(t, "end", end); !errors.Is(got.err, context.Canceled) {
		t.Errorf("the client that left got %+v", got)
	}
	select {
	case <-vm.migration.Done():
		t.Fatal("the migration ended with its client")
	default:
	}
	// Another client sees how it goes on, and how it ends.
	first, end = follow(func(f func(migrate.Progress)) (migrate.Result, error) { return c.Follow(context.Background(), f) })
	wait(t, "progress", first)
	info, err := c.Info(context.Background())
	if err != nil || info.Migration == nil || info.Migration.Phase != migrate.PhasePrecopy {
		t.Errorf("%+v, %v", info, err)
	}
	if err := c.Cancel(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := wait(t, "result", end); got.err != nil || got.res.Status != "cancelled" {
		t.Errorf("%+v", got)
	}
	if err := c.Cancel(context.Background()); !errors.Is(err, vmm.ErrState) {
		t.Errorf("a second cancel: %v", err)
	}
	status, _, body := request(t, c, "GET", "/v1/migration", "")
	if status != 200 || !strings.Contains(body, `"status":"cancelled"`) {
		t.Errorf("%d %s", status, body)
	}
}

func TestCancelTooLate(t *testing.T) {
	vm := &fakeVM{migration: newFakeMigration()}
	vm.migration.cancelErr = errors.New("too late: COMMIT may have left")
	c, _ := serve(t, t.TempDir(), "", vm)
	if err := c.Cancel(context.Background()); !errors.Is(err, vmm.ErrState) || !strings.Contains(err.Error(), "too late") {
		t.Errorf("%v", err)
	}
	vm.migration.end(migrate.Result{Status: "completed"})
}

func TestStartWithoutFollowing(t *testing.T) {
	vm := &fakeVM{}
	c, _ := serve(t, t.TempDir(), "", vm)
	status, header, body := request(t, c, "POST", "/v1/migration", `{"to":"h:1"}`)
	if status != 202 || header.Get("Content-Type") != "application/json" || !strings.Contains(body, `"phase":"precopy"`) {
		t.Errorf("%d %s", status, body)
	}
	vm.migration.end(migrate.Result{Status: "failed", Error: "no route"})
	status, header, body = request(t, c, "GET", "/v1/migration/events", "")
	lines := strings.Split(strings.TrimSpace(body), "\n")
	if status != 200 || header.Get("Content-Type") != "application/x-ndjson" || len(lines) != 2 ||
		!strings.Contains(lines[0], "progress") || !strings.Contains(lines[1], `"error":"no route"`) {
		t.Errorf("%d %q", status, lines)
	}
}

func TestStartRefused(t *testing.T) {
	vm := &fakeVM{err: &stateError{}}
	c, _ := serve(t, t.TempDir(), "", vm)
	_, err := c.Migrate(context.Background(), api.MigrateRequest{To: "h:1"}, nil)
	if !errors.Is(err, vmm.ErrState) || err.Error() != "a migration runs already" {
		t.Errorf("%v", err)
	}
}

type stateError struct{}

func (*stateError) Error() string        { return "a migration runs already" }
func (*stateError) Is(target error) bool { return target == vmm.ErrState }

// A VM that dies in the middle is told apart from one that was never there.
func TestProcessDies(t *testing.T) {
	vm := &fakeVM{migration: newFakeMigration()}
	dir := t.TempDir()
	claim, err := api.ClaimName(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := claim.Listen()
	if err != nil {
		t.Fatal(err)
	}
	conns := &recorder{Listener: ln}
	srv := api.NewServer(vm, claim.Socket())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(conns) }()
	c := api.Open(claim.Socket())
	first, end := follow(func(f func(migrate.Progress)) (migrate.Result, error) {
		return c.Migrate(context.Background(), api.MigrateRequest{To: "h:1"}, f)
	})
	wait(t, "progress", first)
	conns.kill()
	if got := wait(t, "end", end); !errors.Is(got.err, api.ErrLost) {
		t.Errorf("%+v, want ErrLost", got)
	}
	srv.Shutdown()
	if err := <-served; err != nil {
		t.Error(err)
	}
	claim.Release()
	if _, err := c.Info(context.Background()); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("%v, want ErrNotRunning", err)
	}
}
