# ruff: noqa
"""One game of players against one model: settings as name=value, results appended to a JSON lines file."""
import sys, time, json, functools, os
os.environ.setdefault("GLIBC_TUNABLES","glibc.malloc.hugetlb=1")
from pathlib import Path
import numpy as np, jax, jax.numpy as jnp, optax
from dataclasses import replace
jax.config.update("jax_compilation_cache_dir","/tmp/w/x/cache"); jax.config.update("jax_persistent_cache_min_compile_time_secs",1.0)
import ibau_jax
from flax import nnx
from ibau_jax.functional import split_weights, make_apply, with_weights, Weights
from ibau_jax.execution import DEFAULT_EXECUTION
from ibau_jax.compilation import compiler_options
from ibau_jax.config import AuditConfig
from ibau_jax.auditing.search import compile_search, run_search, measure
from ibau_jax.auditing.judgement import median_size
from ibau_jax.augmentation import augmented, mixed, may_mirror
from ibau_jax.perturbations import Pixel, Patch, Warp, apply_each
from ibau_jax.hypergradient import hypergradient, SOLVERS
from benchmarks.zoo import attack_of, others_of
S=Path(os.environ['IBAU_SHARED'])
FILES={p.stem:p for d in ('checkpoints','zoo') for p in (S/d).glob('*.pth')}
SHORT={'b8':'badnets_8_02_ckpt','l0':'l0_inv_0_02_ckpt','gw':'gtsrb-wanet-4-1','cc':'cifar-clean-0'}
D=dict(model='b8',n=100,seed=0,steps=60,lr=8e-4,lam=5.,pow=4.,cap=16.,B=100,stamped=40,unt=.5,nu=4,umult=0.,R=12.,drawn=4,inner=16,asc=1,rate=.4,
 spaces='pixel+patch',outer='all',K=0,eta=.001,crossfit=0,mix=.5,crop=2,warm=60,eps=1e-8,b2=.999,b1=.9,T=1.,feat=0.,teacher='same',every=20,n_eval=2000,ustep=0,urestart=0,scalemin=1.,opt='adam',wd=0.,sam=0.,umax=1.,lo=1.,kls=0,tag='',const=0,uclip=0,mirror=1,all=0,xs=0.,uk=40,wex=0.,h=1.,q=1.,strong=0,wu=1.,wp=1.,wumax=0,ub=50,joint=0,fresh=0,succ=.9,aug='',lu=0,sb=0,lrw=0.,runmax=0,lrp=0)
SP={'pixel':Pixel(),'patch':Patch(),'warp':Warp()}
def enlarge(name,d,f):
    if name=='patch': return {'mask':jnp.clip(d['mask']*f,0,1),'pattern':d['pattern']}
    return d*f
def capture_last(model):
    """apply(rest,params,x)->(features before the last Linear, logits)"""
    last=[(p,m) for p,m in nnx.iter_graph(model) if isinstance(m,nnx.Linear)][-1]
    return last
CACHE={}
def go(A):
    A=type('A',(),{**D,**A}); t0=time.time()
    name=SHORT.get(A.model,A.model)
    c=ibau_jax.load(FILES[name]); model=c.model(); data=others_of(name)
    sp=ibau_jax.split_dataset(data,n_clean=A.n,seed=A.seed); clean,ev=sp.clean_set,sp.evaluation.first(A.n_eval)
    att=attack_of(name)
    def evaluate(m):
        r=ibau_jax.evaluate(m,ev,att); return [round(100*v,1) if v is not None else None for v in (r.acc,r.asr,r.ra)]
    apply=make_apply(model,DEFAULT_EXECUTION); W=split_weights(model); th0,rest=W
    nc=c.num_classes; shape=clean.images.shape[1:]; rng=np.random.default_rng(A.seed+1000)
    X=jnp.asarray(clean.images,jnp.float32)/255. if clean.images.dtype==np.uint8 else jnp.asarray(clean.images); Y=jnp.asarray(clean.labels,jnp.int32)
    flip=may_mirror('tolerated',model,clean) if A.mirror else False
    names=A.spaces.split('+') if A.spaces else []
    jit=functools.partial(jax.jit,compiler_options=compiler_options())
    fwd=lambda th,x: apply(rest,th,x)
    before=evaluate(model)
    # warm up: players at rest
    pl={}
    key=(name,A.n,A.seed,A.warm) if A.succ==.9 else (name,A.n,A.seed,A.warm,A.succ)
    for s in names:
        k2=(*key,s); f=Path('/tmp/w/x/warm')/('_'.join(map(str,k2))+'.pkl'); f.parent.mkdir(exist_ok=True)
        import pickle
        if f.exists(): found=pickle.loads(f.read_bytes()); secs=found[2]; found=found[:2]
        else:
            cfg=AuditConfig(steps=A.warm,batch_size=16,seed=A.seed,success=A.succ)
            search=compile_search(model,nc,clean,SP[s],cfg,DEFAULT_EXECUTION); t1=time.time()
            r=run_search(search,model,clean); secs=time.time()-t1; found=(jax.tree.map(np.asarray,r.triggers),np.asarray(r.sizes))
            f.write_bytes(pickle.dumps((*found,secs)))
        trig=jax.tree.map(jnp.asarray,found[0]); asc=SP[s].ascent(optax.constant_schedule(A.rate))
        pl[s]=[trig,jax.vmap(asc.init)(trig),jnp.asarray(found[1],jnp.float32)]
        sz=found[1]; print(s,'warm',round(secs,1),'median',round(median_size(sz),2),[(int(a),round(float(median_size(sz)/sz[a]),2)) for a in np.argsort(sz)[:3]],flush=True)
    def towards(s,tr,th,x,y,t):
        lg=fwd(th,SP[s].apply(tr,x)); oth=(y!=t).astype(jnp.float32); n=jnp.maximum(oth.sum(),1)
        l=optax.softmax_cross_entropy_with_integer_labels(lg,jnp.full_like(y,t))
        return (l*oth).sum()/n, ((lg.argmax(-1)==t)*oth).sum()/n
    def one(s,th,tr,st,size,t,x,y):
        g,f=jax.grad(lambda d:towards(s,d,th,x,y,t),has_aux=True)(tr)
        size=jnp.minimum(size*jnp.where(f>=A.succ,1-.1*A.rate,1+.1*A.rate),SP[s].max_size(shape))
        up,st=SP[s].ascent(optax.constant_schedule(A.rate)).update(g,st,size=size)
        return SP[s].project(optax.apply_updates(tr,up),size),st,size
    @jit
    def ascend(th,sub,t,x,y):
        return {s:jax.vmap(functools.partial(one,s,th),(0,0,0,0,None,None))(*sub[s],t[s],x,y) for s in sub}
    # published untargeted
    @jit
    def pubstep(th,u,x):
        yy=jnp.argmax(fwd(th,x),-1)
        ap=(lambda d,x: jnp.clip(x+d,0,1)) if A.uclip else (lambda d,x:x+d)
        g=jax.vmap(jax.grad(lambda d:-optax.softmax_cross_entropy_with_integer_labels(fwd(th,ap(d,x)),yy).mean()+.001*(d**2).sum()))(u); return u-10.*g
    def batch(m,idx=None):
        pool=np.arange(A.n) if idx is None else idx
        return rng.choice(pool,m,replace=len(pool)<m)
    def find_u(th):
        U=jnp.zeros((A.nu,*shape))
        for q in range(A.uk):
            U=pubstep(th,U+(1e-3*jax.random.normal(jax.random.key(q+1000*A.seed),U.shape)),X[batch(min(A.ub,A.n))])
        return U
    R=A.R if not A.umult else min(A.R,A.umult*median_size(np.asarray(pl['pixel'][2])))
    projU=lambda U,r: jax.vmap(lambda d:d*jnp.minimum(1,r/jnp.maximum(jnp.linalg.norm(d),1e-12)))(U)
    nunt=int(round(A.unt*A.stamped)); per=(A.stamped-nunt)//max(1,len(names)); 
    if A.unt>0: U0=find_u(th0); print('U norms',np.round(np.linalg.norm(np.asarray(U0).reshape(A.nu,-1),axis=1),1),'R',round(R,2),flush=True); U=projU(U0,R)
    else: U=jnp.zeros((1,*shape))
    # trainable parts
    paths=jax.tree_util.tree_flatten_with_path(th0)[0]
    def trainable(path,leaf):
        p=jax.tree_util.keystr(path).lower()
        if A.outer=='all': return 1.
        isbn=('scale' in p) or ('bias' in p and ('bn' in p or 'norm' in p))
        if A.outer in ('bn','mask'): return 1. if ('scale' in p or 'bias' in p) else 0.
        if A.outer.startswith('last'):
            k=int(A.outer[4:]); order=[i for i,(q,_) in enumerate(paths)]; i=[q for q,_ in paths].index(path); return 1. if i>=len(paths)-k else 0.
        if A.outer.startswith('first'): 
            k=int(A.outer[5:]); i=[q for q,_ in paths].index(path); return 1. if i<k else 0.
    M=jax.tree_util.tree_map_with_path(trainable,th0)
    if A.opt=='adam': opt=optax.adam(1.,b1=A.b1,b2=A.b2,eps=A.eps)
    elif A.opt=='sgd': opt=optax.sgd(1.,momentum=.9)
    elif A.opt=='lion': opt=optax.lion(1.)
    f0=jit(lambda x: jax.nn.softmax(fwd(th0,x)/A.T))
    n=A.B-nunt-per*len(names)
    pool_in=np.arange(A.n); pool_out=np.arange(A.n)
    if A.crossfit: perm=np.random.default_rng(5).permutation(A.n); pool_in,pool_out=perm[:A.n//2],perm[A.n//2:]
    def losses(th,deltas,x,y,soft,xs,ys,whichp,factors,xu,yu,whichu,U,softs,wts):
        parts=[x]
        if A.joint and names:
            z=xs['all']
            for s in names:
                chosen=jax.tree.map(lambda l:l[whichp[s]],deltas[s])
                z=apply_each(SP[s],jax.vmap(functools.partial(enlarge,s))(chosen,factors[s]),z)
            parts.append(z)
        for s in ([] if A.joint else names):
            chosen=jax.tree.map(lambda l:l[whichp[s]],deltas[s])
            chosen=jax.vmap(functools.partial(enlarge,s))(chosen,factors[s])
            parts.append(apply_each(SP[s],chosen,xs[s]))
        if nunt: parts.append(xu+U[whichu])
        lg=fwd(th,jnp.concatenate(parts)); lc,ls=lg[:n],lg[n:]
        ce=optax.softmax_cross_entropy(lc,y).sum(); kl=A.T**2*optax.losses.kl_divergence(jax.nn.log_softmax(lc/A.T),soft).sum()
        yall=jnp.concatenate([ys[s] for s in (['all'] if A.joint and names else names)]+([yu] if nunt else [])) if (names or nunt) else None
        cs=(optax.softmax_cross_entropy_with_integer_labels(ls,yall)*wts).sum() if yall is not None else 0.
        if A.kls: cs=cs*(1-A.kls)+A.kls*optax.losses.kl_divergence(jax.nn.log_softmax(ls),softs).sum()
        return (ce+A.lam*kl+cs)/lg.shape[0]
    @jit
    def outer(th,os_,deltas,targets,xin,yin,args,lr):
        if A.K==0: l,g=jax.value_and_grad(lambda th:losses(th,deltas,*args))(th)
        else:
            def inner_l(deltas,th):
                return sum(jnp.sum(jax.vmap(lambda tr,t:towards(s,tr,th,xin,yin,t)[0])(deltas[s],targets[s])) for s in names)
            l,g=hypergradient(lambda d,th:losses(th,d,*args),inner_l,deltas,th,step_size=A.eta,solve=SOLVERS['neumann'](A.K))
        g=jax.tree.map(lambda g,m:g*m,g,M)
        up,os_=opt.update(g,os_,th); th=jax.tree.map(lambda t,u,m:t+lr*u*m,th,up,M)
        if A.outer=='mask':
            th=jax.tree_util.tree_map_with_path(lambda p,t,t0: jnp.clip(t/t0,0,1)*t0 if 'scale' in jax.tree_util.keystr(p).lower() else t,th,th0)
        return th,os_,l
    th,os_=th0,opt.init(th0); log=[]
    eye=np.eye(nc,dtype=np.float32)
    if A.aug=='warp':
        W_=Warp()
        @jit
        def aug(k,i):
            x=augmented(jax.random.key(k),X[i],A.crop,bool(flip)); kk=jax.random.key(k+77)
            fl=jax.random.normal(kk,(len(i),4,4,2)); r=jax.random.uniform(jax.random.fold_in(kk,1),(len(i),1,1,1),maxval=2.)
            return apply_each(W_,fl*r,x)
    else: aug=None
    aug=(lambda k,i,w=aug: w(k,np.asarray(i))) if aug else lambda k,i: augmented(jax.random.key(k),X[np.asarray(i)],A.crop,bool(flip))
    tl=time.time(); best=1.
    for k in range(A.steps):
        sub,targets,idx={}, {}, {}
        for s in names:
            tr,st,size=pl[s]; sz=np.asarray(size); rat=median_size(sz)/sz
            lw=A.pow*np.log(rat); g=lw+rng.gumbel(size=nc); m=min(A.drawn,nc); ids=np.argsort(-g)[:m]
            idx[s]=ids; targets[s]=jnp.asarray(ids,jnp.int32)
            sub[s]=jax.tree.map(lambda l:l[ids],tuple(pl[s]))
        if names:
            for _ in range(A.asc):
                i=batch(min(A.inner,A.n),pool_in); sub=ascend(th,sub,targets,X[i],Y[i])
            for s in names:
                for j in range(3): pl[s][j]=jax.tree.map(lambda l,u:l.at[idx[s]].set(u),pl[s][j],sub[s][j])
        if A.unt and A.urestart and k and k%A.urestart==0: U=projU(find_u(th),R)
        if A.unt and A.ustep: 
            for _ in range(A.ustep): U=pubstep(th,U,X[batch(min(50,A.n))])
            U=projU(U,R)
        i=batch(n,pool_out); x=aug(2*k,i); y=eye[np.asarray(Y[i])]
        if A.mix: 
            j=rng.permutation(n); m=rng.uniform(0,A.mix,(n,1)).astype(np.float32)
            x=x*(1-m[:,:,None,None])+x[j]*m[:,:,None,None]; y=y*(1-m)+y[j]*m
        soft=f0(x)
        xs,ys,wp,fac={}, {}, {}, {}; wts=[]
        if A.joint and names:
            tot=per*len(names); i=batch(tot,pool_out); xs['all']=aug(10000+k,i); ys['all']=Y[np.asarray(i)]
            cand=[(s,w,float((median_size(np.asarray(pl[s][2]))/np.asarray(pl[s][2]))[idx[s]][w])) for s in names for w in range(len(idx[s]))]
            r_=np.array([c[2] for c in cand]); p_=r_**A.pow; p_/=p_.sum(); pick=rng.choice(len(cand),tot,p=p_)
            top=np.clip(A.h*r_[pick]**A.q,A.lo,A.cap); f_=rng.uniform(A.lo,top) if not A.lu else np.exp(rng.uniform(0,np.log(np.maximum(top,1))))
            for s in names:
                wp[s]=jnp.asarray([cand[c][1] if cand[c][0]==s else 0 for c in pick]); fac[s]=jnp.asarray([f if cand[c][0]==s else 0. for c,f in zip(pick,f_)],jnp.float32)
            wts.append(np.clip(np.log(np.maximum(r_[pick],1e-3))/np.log(A.wex),0,1)**A.wp if A.wex else np.ones(tot))
        for q,s in enumerate([] if A.joint else names):
            i=batch(per,pool_out); xs[s]=aug(10000*(q+1)+k,i); ys[s]=Y[np.asarray(i)]
            w=np.arange(per)%len(idx[s]); wp[s]=jnp.asarray(w)
            sz=np.asarray(pl[s][2]); rat=(median_size(sz)/sz)[idx[s]][w]
            top=np.clip(A.h*rat**A.q,A.lo,A.cap); fac[s]=jnp.asarray(rng.uniform(A.lo,top),jnp.float32)
            wts.append(np.clip(np.log(np.maximum(rat,1e-3))/np.log(A.wex),0,1)**A.wp if A.wex else np.ones(per))
        i=batch(max(nunt,1),pool_out); xu=aug(50000+k,i); yu=Y[np.asarray(i)]; wu=jnp.asarray(np.arange(len(i))%A.nu)
        most=max([float((median_size(np.asarray(pl[s][2]))/np.asarray(pl[s][2])).max()) for s in names]+[1.])
        best=max(best,most); most_=best if A.runmax else most
        wu=A.wu*(float(np.clip(np.log(most_)/np.log(A.wex),0,1)**A.wp) if A.wumax else 1.); WU=wu; wu=jnp.asarray(np.arange(len(i))%A.nu)
        softs=jax.nn.softmax(fwd(th0,jnp.concatenate([xs[s] for s in xs]+([xu] if nunt else [])))) if A.kls else jnp.zeros(())
        lr=A.lr*((.5*(1+np.cos(np.pi*k/A.steps))*.9+.1) if not A.const else 1.)
        if A.lrp: lr=lr*float(np.clip(np.log(best)/np.log(A.wex),0,1)**A.wp)
        if A.lrw: lr=lr*max(float(np.clip(np.log(most)/np.log(A.wex),0,1)**A.lrw),.02)
        i=batch(min(A.inner,A.n),pool_in)
        th,os_,l=outer(th,os_,{s:sub[s][0] for s in names},targets,X[i],Y[i],(x,jnp.asarray(y),soft,xs,ys,wp,fac,xu,yu,wu,U,softs,jnp.asarray(np.concatenate(wts+[np.full(nunt,WU)]) if (wts or nunt) else np.zeros(0),jnp.float32)),jnp.float32(lr))
        if (k+1)%A.every==0 or k+1==A.steps:
            te=time.time(); e=evaluate(with_weights(model,Weights(th,rest)))
            rr={s:[(int(a),round(float(median_size(np.asarray(pl[s][2]))/np.asarray(pl[s][2])[a]),1)) for a in np.argsort(np.asarray(pl[s][2]))[:2]] for s in names}
            log.append((k+1,e,round(te-tl,1))); print(k+1,round(te-tl),'loss',round(float(l),3),e,rr,flush=True); tl+=time.time()-te
    if A.fresh:
        m=with_weights(model,Weights(th,rest))
        for s in names:
            r=run_search(compile_search(m,nc,clean,SP[s],AuditConfig(steps=60,seed=A.seed+7),DEFAULT_EXECUTION),m,clean); sz=r.sizes
            print('fresh',s,round(float(median_size(sz)),2),[(int(a),round(float(median_size(sz)/sz[a]),2)) for a in np.argsort(sz)[:4]],flush=True)
            log.append((s,[(int(a),round(float(median_size(sz)/sz[a]),2)) for a in np.argsort(sz)[:4]]))
        if len(log): log.append(log[-1-len(names)])
    r=dict(settings={k:v for k,v in A.__dict__.items() if k in D and D[k]!=v},before=before,log=log,secs=round(time.time()-t0))
    with open('/tmp/w/x/results.jsonl','a') as f: f.write(json.dumps(r)+'\n')
    return log[-1][1]
def parse(words):
    A={}
    for w in words:
        k,v=w.split('='); A[k]=type(D[k])(float(v)) if not isinstance(D[k],str) else v
    return A
if __name__=='__main__':
    lines=[l.split() for l in sys.stdin.read().splitlines() if l.strip() and not l.startswith('#')] if len(sys.argv)==1 else [sys.argv[1:]]
    for words in lines:
        models=[w for w in words if w.startswith('model=')] 
        for m in (models[0][6:].split(',') if models else ['b8']):
            A=parse([w for w in words if not w.startswith('model=')]); A['model']=m
            print('#',m,*words,flush=True)
            try: go(A)
            except Exception as e:
                import traceback; traceback.print_exc()
            jax.clear_caches()
